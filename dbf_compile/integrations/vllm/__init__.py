"""vLLM: compressed folders are served by an existing engine.

    pip install vllm dbf-compile
    vllm serve FOLDER                                # or vllm.LLM("FOLDER"); nothing else names this package

vLLM loads the plugin by its entry point in every process, and ``quant_method`` in config.json selects it. Works: column-,
row-, merged, QKV-parallel and replicated layers, layers with a first stage of their own or a shared one, dense layers between,
biases, 8-bit and factored heads, embeddings, experts, tensor and pipeline parallelism, LoRA adapters beside. What does not is
refused in words of this package before a weight is read. Only 0.32 was run, on CPUs.
"""
