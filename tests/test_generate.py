"""Greedy text is transformers' text, token for token; streams, stops, limits and meshes change nothing in it."""

from functools import cache, partial

import numpy as np
import pytest

from jaxtune import loading
from jaxtune.assemble import FULL, Source, assemble
from jaxtune.config import MeshSection, ModelSection
from jaxtune.errors import ConfigError, ModelError
from jaxtune.generate import CHUNK, Generator, bucket, left_padded
from jaxtune.loading import open_model
from jaxtune.mesh import make_mesh, single_device_mesh
from jaxtune.quant.make import quantize_model
from jaxtune.quant.makers import Int8Maker
from jaxtune.sampling import Sampling

PROMPTS = [[5, 6, 7, 8, 9], [40], list(range(100, 170)), [200, 3, 9]]  # of 5, 1, 70 and 3 tokens


@cache
def opened(directory):
    source = Source.open(ModelSection(path=str(directory)))
    return assemble(source, FULL, single_device_mesh())


def generator(directory, stop=()):
    return Generator(opened(directory).model, single_device_mesh(), "float32", stop)


def peer_tokens(directory, prompt, count, stop=None, **settings):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    model.generation_config.eos_token_id = stop
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **settings)
    return out[0, len(prompt) :].tolist()


FAMILIES = [
    ("qwen2", {}),
    ("llama", {}),
    ("mistral", {"sliding_window": 16}),
    ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("family", "settings"), FAMILIES)
def test_greedy_tokens_of_a_mixed_batch_are_those_of_transformers(tiny_model, family, settings):
    directory = tiny_model(family, **settings)
    ours = generator(directory).tokens(opened(directory).params, PROMPTS, 40)
    assert ours == [peer_tokens(directory, prompt, 40) for prompt in PROMPTS]
    assert len({token for row in ours for token in row}) > 20  # not one token over and over


def test_a_row_ends_before_its_stop_token_as_in_transformers(tiny_model):
    directory = tiny_model("qwen2")
    free = generator(directory).tokens(opened(directory).params, PROMPTS, 40)
    stop = (free[0][7], free[2][20])
    ours = generator(directory, stop).tokens(opened(directory).params, PROMPTS, 40)
    for prompt, row in zip(PROMPTS, ours):
        peer = peer_tokens(directory, prompt, 40, stop=list(stop), pad_token_id=0)
        assert row == (peer[:-1] if peer[-1] in stop else peer)
    assert len(ours[0]) <= 7
    assert len({len(row) for row in ours}) > 1


@pytest.mark.parametrize("chunk", [1, 5, CHUNK])
def test_a_stream_gives_the_same_tokens_in_pieces(tiny_model, chunk):
    directory = tiny_model("qwen2")
    params = opened(directory).params
    pieces = list(generator(directory).stream(params, PROMPTS[:2], 12, chunk=chunk))
    assert [len(piece[0]) for piece in pieces[:-1]] == [1, *[chunk] * (len(pieces) - 2)]
    joined = [[token for piece in pieces for token in piece[row]] for row in range(2)]
    assert joined == generator(directory).tokens(params, PROMPTS[:2], 12)


def test_no_forward_pass_is_spent_after_the_last_token(tiny_model, monkeypatch):
    directory = tiny_model("qwen2")
    asked = generator(directory)
    calls = []
    decode = asked._decode
    monkeypatch.setattr(asked, "_decode", lambda *args, **kw: calls.append(1) or decode(*args, **kw))
    params = opened(directory).params
    assert len(asked.tokens(params, [PROMPTS[0]], 1)[0]) == 1
    assert calls == []
    list(asked.stream(params, [PROMPTS[0]], 5, chunk=1))
    assert len(calls) == 4
    calls.clear()
    first = asked.tokens(params, [PROMPTS[0]], 1)[0][0]
    asked.stop = (first,)
    assert asked.tokens(params, [PROMPTS[0]], 5) == [[]]
    assert calls == []


@pytest.mark.parametrize(("stops", "drawn_after_the_first"), [(False, 5), (True, 3)])
def test_the_loop_on_the_device_ends_when_every_row_has_ended(tiny_model, stops, drawn_after_the_first):
    directory = tiny_model("qwen2")
    asked, model = generator(directory), opened(directory)
    row = asked.tokens(model.params, PROMPTS[:1], 6)[0]
    assert row[3] not in row[:3]
    knobs = {**Sampling().knobs, "stop": np.array([row[3]] if stops else [], np.int32)}
    inputs = left_padded(PROMPTS[:1], 1, 64)
    state, _ = asked._prefill(model.params, inputs, np.array([6]), knobs, columns=96, kind="greedy")
    state, drawn = asked._decode(model.params, state=state, steps=np.int32(CHUNK), knobs=knobs, kind="greedy")
    assert np.asarray(drawn)[:, 0].tolist() == [
        *row[1:][:drawn_after_the_first],
        *[-1] * (CHUNK - drawn_after_the_first),
    ]
    assert int(state["cache"].length) == 64 + drawn_after_the_first


def test_what_is_asked_beside_a_prompt_does_not_change_its_answer(tiny_model):
    directory = tiny_model("llama")
    params, asked = opened(directory).params, generator(directory)
    together = asked.tokens(params, PROMPTS, 10)
    assert together == [asked.tokens(params, [prompt], 10)[0] for prompt in PROMPTS]


def test_sampling_repeats_with_its_seed_and_differs_with_another(tiny_model):
    directory = tiny_model("qwen2")
    params, asked = opened(directory).params, generator(directory)

    def drawn(seed, prompts=PROMPTS[:2]):
        return asked.tokens(params, prompts, 20, Sampling(temperature=1.0, top_k=50, top_p=0.95, seed=seed))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(1, PROMPTS[:1])[0] == drawn(1)[0]
    twice = drawn(1, [PROMPTS[0], PROMPTS[0]])
    assert twice[0] != twice[1]


def test_sampling_of_the_single_likeliest_token_is_greedy(tiny_model):
    directory = tiny_model("qwen2")
    params, asked = opened(directory).params, generator(directory)
    assert asked.tokens(params, PROMPTS, 10, Sampling(temperature=2.0, top_k=1)) == asked.tokens(params, PROMPTS, 10)


def test_a_prompt_longer_than_the_models_positions_is_refused_with_the_numbers(tiny_model):
    directory = tiny_model("qwen2")
    with pytest.raises(ModelError, match="256 tokens; the model has 256 positions"):
        generator(directory).stream(opened(directory).params, [[5] * 256], 10)


@pytest.mark.parametrize(("prompts", "count"), [([[]], 5), ([[5]], 0)])
def test_an_empty_prompt_and_no_token_asked_for_are_refused(tiny_model, prompts, count):
    directory = tiny_model("qwen2")
    with pytest.raises(ConfigError):
        generator(directory).tokens(opened(directory).params, prompts, count)


def test_an_answer_ends_where_the_models_positions_end_and_says_so(tiny_model, capsys):
    directory = tiny_model("qwen2")
    prompts = [[5] * 250, [6] * 3]
    rows = generator(directory).tokens(opened(directory).params, prompts, 10)
    assert [len(row) for row in rows] == [6, 10]
    assert "250 tokens was cut" in capsys.readouterr().out


def test_prompts_of_one_bucket_compile_once(tiny_model):
    directory = tiny_model("qwen2")
    params, asked = opened(directory).params, generator(directory)
    for length, count in ((3, 5), (60, 8), (20, 30)):
        asked.tokens(params, [[7] * length], count)
        list(asked.stream(params, [[8] * length], count, Sampling(), chunk=1))
    assert (asked._prefill._cache_size(), asked._decode._cache_size()) == (1, 1)


def test_new_sampling_numbers_compile_nothing(tiny_model):
    directory = tiny_model("qwen2")
    params, asked = opened(directory).params, generator(directory)
    for k, p, temperature in ((5, 0.5, 1.0), (7, 0.9, 0.3), (9, None, 2.0)):
        asked.tokens(params, [[7]], 5, Sampling(temperature, k, p, seed=k))
    assert (asked._prefill._cache_size(), asked._decode._cache_size()) == (1, 1)


def test_the_cache_is_given_up_to_each_step(tiny_model):
    directory = tiny_model("qwen2")
    asked, model = generator(directory), opened(directory)
    knobs = {**Sampling().knobs, "stop": np.array([], np.int32)}
    inputs = left_padded([[5, 6]], 1, 64)
    state, _ = asked._prefill(model.params, inputs, np.array([9]), knobs, columns=96, kind="greedy")
    asked._decode(model.params, state=state, steps=np.int32(1), knobs=knobs, kind="greedy")
    assert all(array.is_deleted() for array in state["cache"].k)


def test_buckets_are_few_and_waste_little():
    sizes = {bucket(n) for n in range(1, 5000)}
    assert sorted(sizes)[:6] == [64, 96, 128, 192, 256, 384]
    assert len(sizes) == 14
    assert all(n <= bucket(n) <= max(64, n * 1.5) for n in range(1, 5000))


def test_left_padding_is_segment_zero_and_positions_start_at_the_first_token():
    arrays = left_padded([[5, 6, 7], [8]], 3, 4)
    assert arrays["tokens"].tolist() == [[0, 5, 6, 7], [0, 0, 0, 8], [0, 0, 0, 0]]
    assert arrays["positions"].tolist() == [[0, 0, 1, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert arrays["segments"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


def decode_temporaries(asked, params) -> int:
    """Bytes beside the arguments and the results."""
    knobs = {**Sampling().knobs, "stop": np.array([-1], np.int32)}
    prefill = asked._prefill.lower(params, left_padded([[5]], 1, 64), np.array([9]), knobs, columns=96, kind="greedy")
    state, _ = prefill.out_info
    decode = asked._decode.lower(params, state=state, steps=np.int32(1), knobs=knobs, kind="greedy")
    return decode.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 16}], ids=["qwen2", "mistral"])
def test_a_large_model_that_is_loaded_on_one_cpu_has_its_layers_apart_and_draws_the_same_tokens(
    tiny_model, settings, monkeypatch
):
    directory = tiny_model("mistral" if settings else "qwen2", num_hidden_layers=3, **settings)
    monkeypatch.setattr(loading, "LARGE", 4 * opened(directory).model.config.layer_weights + 1)
    assert open_model(directory).assembled.model.stacks == (range(3),)
    monkeypatch.setattr(loading, "LARGE", loading.LARGE - 1)
    loaded = open_model(directory).assembled
    assert loaded.model.stacks == (range(1), range(1, 2), range(2, 3))
    asked = Generator(loaded.model, loaded.mesh, "float32", ())
    expected = generator(directory).tokens(opened(directory).params, PROMPTS, 40)
    assert asked.tokens(loaded.params, PROMPTS, 40) == expected


def test_no_weight_is_copied_for_a_token_where_layers_are_apart(tiny_model, layers_apart):
    directory = tiny_model("qwen2", hidden_size=256, intermediate_size=1024)
    largest, loaded = 256 * 1024 * 4, open_model(directory).assembled
    apart = Generator(loaded.model, loaded.mesh, "float32", ())
    assert decode_temporaries(generator(directory), opened(directory).params) > largest
    assert decode_temporaries(apart, loaded.params) < largest


def test_layers_stay_in_stacks_where_the_compiler_would_make_all_their_weights_wide_at_once(
    tiny_model, tmp_path, monkeypatch, layers_apart
):
    directory = tiny_model("qwen2")
    assert len(open_model(directory, mesh={"fsdp": 8}).assembled.model.stacks) == 1
    quantize_model(str(directory), tmp_path / "int8", Int8Maker())
    assert len(open_model(tmp_path / "int8").assembled.model.stacks) == 1
    for has_units in (True, False):
        monkeypatch.setattr(loading, "has_units", partial(bool, has_units))
        stacks = open_model(directory, dtype="bfloat16").assembled.model.stacks
        assert len(stacks) == (2 if has_units else 1)


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_a_mesh_of_eight_devices_draws_the_same_tokens(tiny_model, sizes):
    directory = tiny_model("qwen2")
    source = Source.open(ModelSection(path=str(directory)))
    model = assemble(source, FULL, make_mesh(MeshSection(**sizes)))
    asked = Generator(model.model, model.mesh, "float32", ())
    expected = generator(directory).tokens(opened(directory).params, PROMPTS, 20)
    assert asked.tokens(model.params, PROMPTS, 20) == expected
    assert (asked._prefill._cache_size(), asked._decode._cache_size()) == (1, 1)


@pytest.mark.real
def test_the_pretrained_model_says_what_it_says_in_transformers(smollm2):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import jaxtune

    question = [{"role": "user", "content": "What is the capital of France? Tell me something about it."}]
    words, peer = (kind.from_pretrained(smollm2.llama) for kind in (AutoTokenizer, AutoModelForCausalLM))
    ids = words.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        out = peer.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    expected = words.decode(out, skip_special_tokens=True)
    assert "Paris" in expected
    for path in (smollm2.gguf, smollm2.qwen2):
        assert jaxtune.load_model(path).generate(question, 24) == expected
