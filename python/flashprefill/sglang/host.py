"""The plugin's place in SGLang."""

from ..engines.host import Host

# What the backends and hooks extend changes between any two of SGLang's versions. The logger is below
# "sglang", so that the engine's handlers print it.
host = Host("SGLang", "sglang.flashprefill", ("0.5.23",))
