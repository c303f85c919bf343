"""`flashprefill train-adapter`: teaches a model to answer from prompts beyond its own context.

Where no model at hand reads 32K tokens, nothing can be judged there. This trains one in half an hour on one
GPU: the rotary base is scaled and a low-rank adapter of the attention learns to find things in long texts.
lora.py is the adapter and its file, tasks.py makes the sequences, run.py is the order of work.
"""
