"""vLLM: compressed folders are served by an existing engine.

    pip install vllm dbf-compile
    vllm serve FOLDER                                # or vllm.LLM("FOLDER"); nothing else names this package

vLLM loads the plugin by its entry point in every process, and ``quant_method`` in config.json selects it. Served are column-, row-,
merged, QKV-parallel and replicated layers with first stages of their own or shared ones, dense layers between, biases, heads and
embeddings of quantized rows, factored heads, experts, tensor parallelism, and LoRA adapters beside. What is not is refused in
words of this package before a weight is read. Run with vLLM 0.32 on CPUs; on a GPU not yet, nor over a pipeline of stages.

``additional_config={"dbf": {"split_stages": True}}`` splits both stages of a layer over ranks, see
:mod:`dbf_compile.integrations.vllm.split`.
"""
