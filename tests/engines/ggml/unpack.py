"""A GGUF model with its weights unpacked to fp32: python unpack.py FROM TO."""

import os
import sys

import llama_cpp

ALL_F32 = 0  # llama_ftype

parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = ALL_F32
parameters.allow_requantize = True
source, target = (path.encode() for path in sys.argv[1:])
status = llama_cpp.llama_model_quantize(source, target + b".part", parameters)
if status != 0:
    sys.exit(f"llama_model_quantize: {status}")
os.replace(target + b".part", target)
