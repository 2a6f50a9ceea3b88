"""Write a GGUF file in another type with llama-cpp-python, as llama.cpp's quantize tool does.

python benchmarks/llama_cpp_quantize.py SOURCE.gguf TARGET.gguf Q4_K_M [--pure] [--layers MXFP4]
"""

import argparse

import llama_cpp


def main() -> None:
    """Write the file named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("type", help="as in LLAMA_FTYPE_MOSTLY_…")
    parser.add_argument("--pure", action="store_true", help="all matrices in this type, no mixture")
    parser.add_argument("--layers", metavar="TYPE", help="the matrices of all layers in this type of GGML")
    options = parser.parse_args()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{options.type}")
    params.nthread, params.allow_requantize, params.pure = 2, True, options.pure
    if options.layers:
        layers = llama_cpp.llama_model_tensor_override(rb"blk\..*", getattr(llama_cpp, f"GGML_TYPE_{options.layers}"))
        overrides = (llama_cpp.llama_model_tensor_override * 2)(layers)  # the second, all zeros, ends the list
        params.tt_overrides = overrides
    status = llama_cpp.llama_model_quantize(options.source.encode(), options.target.encode(), params)
    if status:
        raise SystemExit(f"{options.target}: llama.cpp could not write it (status {status})")


if __name__ == "__main__":
    main()
