"""The plugin's place in vLLM."""

from ..engines.host import Host

# The private interfaces of vLLM that the backends extend change between its minor versions. The logger is
# below "vllm", so that the engine's handlers print it.
host = Host("vLLM", "vllm.flashprefill", ("0.32", "0.33"))
