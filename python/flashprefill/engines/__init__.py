"""What the plugins for inference engines share, and what knows none of them.

options.py is what a user can ask for, rows.py how a batch is divided, caches.py how paged caches look by
their strides, sparse.py the way from a divided batch to the kernel, metrics.py the counters, and host.py a
plugin's place in its engine: whose log it writes to and which versions it knows. flashprefill.vllm and
flashprefill.sglang hold what knows their engine.

Importing this package imports neither torch nor an engine.
"""
