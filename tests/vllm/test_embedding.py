"""An embedding and an LM head in vLLM, in this process; more ranks than one are simulated."""

import pytest
import tiny
import torch
from bq_kernels.format import FormatError

pytest.importorskip("vllm", reason="vLLM is not installed")

from .test_linear import cpu, distributed  # noqa: F401  fixtures

EMBED, HEAD = "model.embed_tokens", "lm_head"
IDS = torch.tensor([[0, 3, 499], [255, 256, 257]])
FORMATS = {
    "4 bits": {"bits": 4},
    "3 bits, zeros": {"bits": 3, "zero_point": "float", "group_size": 64},
    "2 bits, hadamard, full width": {"kind": "hadamard", "block_size": {"default": 128, "down_proj": 192}},
    "no rotation, one scale per row": {"kind": "none", "group_size": -1},
    "4 bits, kept rows": {"bits": 4, "kept": 30},
    "2 bits, hadamard, kept rows": {"kind": "hadamard", "kept": 499},
}


def packed_config(*names, bits=4, skip=(), kept=0, **options):
    tokens = dict.fromkeys(names, kept) if kept else {}
    return tiny.quant_config(skip=skip, module_bits=dict.fromkeys(names, bits), kept_tokens=tokens, **options)


def build(quant, name, dtype=torch.float32, prefix=None):
    """The embedding or LM head that vLLM makes in a model of the sizes of `tiny`."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    from bq_vllm.config import ButterflyConfig

    kind = ParallelLMHead if name == HEAD else VocabParallelEmbedding
    options = {"params_dtype": dtype, "quant_config": ButterflyConfig(quant)}
    return kind(tiny.VOCABULARY, tiny.HIDDEN, prefix=name if prefix is None else prefix, **options)


def load(layer, name, tensors):
    """Load a layer from the tensors of a checkpoint as vLLM does, and finish it."""
    for key, tensor in tensors.items():
        if key.startswith(f"{name}."):
            param = getattr(layer, key.rpartition(".")[2], layer)
            param.weight_loader(param, tensor)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.fixture
def dense(tmp_path):
    """Weights of a random checkpoint, decoded independently."""
    return lambda quant, name, **options: tiny.decode(tiny.write_checkpoint(tmp_path, quant, **options), name)[
        f"{name}.weight"
    ]


@pytest.fixture
def ranks(monkeypatch):
    """Make vLLM believe that it is one rank of several; sums over ranks are left to the test."""
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import vocab_parallel_embedding

    def become(rank, size):
        for module in (vocab_parallel_embedding, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
        monkeypatch.setattr(vocab_parallel_embedding, "tensor_model_parallel_all_reduce", lambda x: x)

    return become


@pytest.mark.parametrize("cpu", ["dense", "reference"], indirect=True)
@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_rows_and_logits(dense, options):
    options = dict(options)
    bits = options.pop("bits", 2)
    quant = packed_config(EMBED, HEAD, bits=bits, **options)
    tensors, x = tiny.random_tensors(quant), torch.randn(3, tiny.HIDDEN)
    embedding, head = (load(build(quant, name), name, tensors) for name in (EMBED, HEAD))
    torch.testing.assert_close(embedding(IDS), dense(quant, EMBED)[IDS], atol=1e-5, rtol=1e-5)
    logits = head.quant_method.apply(head, x)
    assert logits.shape == (3, 512) and not logits[:, tiny.VOCABULARY :].any()
    torch.testing.assert_close(logits[:, : tiny.VOCABULARY], x @ dense(quant, HEAD).T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cpu", ["dense", "reference"], indirect=True)
@pytest.mark.parametrize("prefix", ["", EMBED])
@pytest.mark.parametrize("kept", [0, 40])
def test_tied(dense, prefix, kept):
    """One copy; vLLM's LLaMA gives its embedding no name."""
    quant = packed_config(EMBED, zero_point="float", kept=kept)
    embedding, head = build(quant, EMBED, torch.bfloat16, prefix), build(quant, HEAD, torch.bfloat16)
    assert not list(head.parameters())
    head = head.tie_weights(embedding)
    load(embedding, EMBED, tiny.random_tensors(quant, tied=True))
    head.quant_method.process_weights_after_loading(head)
    assert [parameter.numel() for parameter in head.parameters()] == [0]
    x, want = torch.randn(3, tiny.HIDDEN).bfloat16(), dense(quant, EMBED, tied=True)
    rows, logits = embedding(IDS), head.quant_method.apply(head, x)
    assert rows.dtype == logits.dtype == torch.bfloat16
    torch.testing.assert_close(rows.float(), want[IDS], atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(logits[:, : len(want)].float(), x.float() @ want.T, atol=0.1, rtol=0.02)
    # what LoRA asks for
    for layer in (embedding, head):
        assert layer.weight.dtype == torch.bfloat16 and layer.weight.device == x.device


@pytest.mark.parametrize("cpu", ["dense", "reference"], indirect=True)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kept", [0, 3, 100])
def test_ranks(dense, ranks, size, kept):
    """Rows are cut over the ranks; the last holds the padding, and ids of others give 0. A rank may keep no row."""
    quant = packed_config(EMBED, HEAD, kept=kept)
    tensors, x = tiny.random_tensors(quant), torch.randn(3, tiny.HIDDEN)
    rows, logits = 0, []
    for rank in range(size):
        ranks(rank, size)
        embedding, head = (load(build(quant, name), name, tensors) for name in (EMBED, HEAD))
        rows = rows + embedding(IDS)
        logits.append(head.quant_method.apply(head, x))
    torch.testing.assert_close(rows, dense(quant, EMBED)[IDS], atol=1e-5, rtol=1e-5)
    found = torch.cat(logits, dim=1)[:, : tiny.VOCABULARY]
    torch.testing.assert_close(found, x @ dense(quant, HEAD).T, atol=1e-4, rtol=1e-4)


def test_what_stays_unquantized():
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    from bq_vllm.embedding import ButterflyEmbeddingMethod, TiedHeadMethod, UntiedHeadMethod

    for quant, embedding, head in (
        (tiny.quant_config(), UnquantizedEmbeddingMethod, UnquantizedEmbeddingMethod),
        (tiny.quant_config(skip=()), UnquantizedEmbeddingMethod, UnquantizedEmbeddingMethod),
        (packed_config(EMBED, skip=(HEAD,)), ButterflyEmbeddingMethod, UntiedHeadMethod),
        (packed_config(HEAD), UnquantizedEmbeddingMethod, ButterflyEmbeddingMethod),
        (packed_config(EMBED), ButterflyEmbeddingMethod, TiedHeadMethod),
    ):
        assert type(build(quant, EMBED, prefix="").quant_method) is embedding
        assert type(build(quant, HEAD).quant_method) is head


@pytest.mark.parametrize("cpu", ["dense", "reference"], indirect=True)
@pytest.mark.parametrize("kept", [0, 3])
def test_dummy_weights(kept):
    from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

    layer = build(packed_config(EMBED, kept=kept), EMBED)
    for param in layer.parameters():
        initialize_single_dummy_weight(param)
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.isfinite(layer(IDS)).all()


@pytest.mark.parametrize("cpu", ["dense", "reference"], indirect=True)
def test_what_is_kept(cpu):  # noqa: F811
    layer = load(build(packed_config(EMBED), EMBED), EMBED, tiny.random_tensors(packed_config(EMBED)))
    packed = {"qweight", "scales", "cos_sin", "mix"}
    kept = set() if layer.quant_method.backend == "dense" else packed
    assert set(dict(layer.named_parameters())) == kept | {"weight"}
    assert layer.weight.shape[0] == (512 if layer.quant_method.backend == "dense" else 0)


SCALES = torch.ones(tiny.VOCABULARY, tiny.HIDDEN // 32).half()


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"scales": None}, r"lm_head\.scales: missing from the checkpoint; expected torch\.float16 \[500, 4\]"),
        ({"qweight": None}, r"lm_head\.qweight: missing from the checkpoint; expected torch\.int32 \[500, 16\]"),
        ({"angles": None}, r"lm_head\.angles: missing from the checkpoint; expected torch\.float16 \[2, 192\]"),
        ({"scales": SCALES * torch.nan}, r"lm_head\.scales: holds NaN or infinity"),
        ({"scales": -SCALES}, r"lm_head\.scales: holds zero or a negative number"),
        ({"scales": SCALES[:-1]}, r"lm_head\.scales: expected .*\[500, 4\], found .*\[499, 4\]"),
        ({"zeros": SCALES}, r"lm_head: surplus tensor torch\.float16 \[500, 4\]"),
        ({"kept_rows": None}, r"lm_head\.kept_rows: missing from the checkpoint; expected torch\.float16 \[3, 128\]"),
        (
            {"kept_tokens": torch.tensor([1, 3, 3]).int()},
            r"lm_head\.kept_tokens: expected ascending numbers of 500 rows",
        ),
        ({"kept_tokens": torch.tensor([1, 3, 500]).int()}, r"lm_head\.kept_tokens: expected ascending numbers of 500"),
        ({"kept_tokens": torch.tensor([1, 3]).int()}, r"lm_head\.kept_tokens: expected .*\[3\], found .*\[2\]"),
        ({"weight": torch.ones(500, 128)}, r"lm_head: surplus tensor torch\.float32 \[500, 128\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_tensors_are_refused(edits, message):
    quant = packed_config(HEAD, kept=3)
    tensors = tiny.random_tensors(quant) | {f"{HEAD}.{suffix}": value for suffix, value in edits.items()}
    with pytest.raises(FormatError, match=message):
        load(build(quant, HEAD), HEAD, {key: value for key, value in tensors.items() if value is not None})


def test_heads_that_are_tied_and_not():
    """config.json and module_bits must agree."""
    head = build(packed_config(EMBED), HEAD)
    with pytest.raises(FormatError, match=r"lm_head\.weight: missing .* config\.json does not tie them"):
        head.quant_method.process_weights_after_loading(head)
    both = packed_config(EMBED, HEAD)
    with pytest.raises(FormatError, match="module_bits: lm_head is tied to the embedding; name only the embedding"):
        build(both, HEAD).tie_weights(build(both, EMBED))
    skipped = packed_config(EMBED, skip=(HEAD,))
    with pytest.raises(FormatError, match="modules_to_not_convert: lm_head is tied to the embedding, which is packed"):
        build(skipped, HEAD).tie_weights(build(skipped, EMBED))
