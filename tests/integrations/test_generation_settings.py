"""Settings of generation: what of them our own loop does as transformers would, and what it leaves to transformers."""

import pytest

from dbf_compile.integrations.generation_settings import UnsuitedError, sampling_of
from dbf_compile.options import Sampling

transformers = pytest.importorskip("transformers")


def test_settings_are_those_that_transformers_would_use():
    config = transformers.GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.1, eos_token_id=[2, 3]
    )
    greedy, ends = sampling_of(config, Sampling(do_sample=False), {})
    assert greedy == Sampling(do_sample=False, repetition_penalty=1.1) and ends == {2, 3}
    drawn, ends = sampling_of(config, Sampling(do_sample=True, top_p=0.5), {"eos_token_id": 7})
    assert (drawn.temperature, drawn.top_p, drawn.top_k) == (0.6, 0.5, 50) and ends == {7}
    with pytest.raises(UnsuitedError, match="nonsense"):
        sampling_of(config, Sampling(), {"nonsense": 1})
    config.no_repeat_ngram_size = 2
    with pytest.raises(UnsuitedError, match="no_repeat_ngram_size"):
        sampling_of(config, Sampling(), {})
