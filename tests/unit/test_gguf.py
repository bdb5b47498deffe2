"""A GGUF file becomes a Hugging Face folder: a small one that is written here, and the real one where it is."""

import importlib.util
import sys

import pytest
import torch
from conftest import ROOT, launch
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, Qwen2TokenizerFast

from r1dist.config import ConvertRun, Model
from r1dist.config.loader import parse
from r1dist.data.templates import load_template
from r1dist.errors import UserError
from r1dist.files import sha256
from r1dist.gguf import TEXTS, build_tokenizer, convert, open_gguf

gguf = pytest.importorskip("gguf")

REAL = ROOT / "models" / "smollm2-135m"
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS = 2, 64, 96, 4, 2
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ċ Ċ", "Ġ Ġ", "1 2", "h i"]
TOKENS = [*CONTROL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES), "<tool>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPES = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "attn_v": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf(
    path, architecture="llama", kind="gpt2", pre="smollm", tokens=TOKENS, template=CHATML, eos=0, without=(), extra=()
):
    """A random model in Q8_0, its norms in float32. `extra`: functions of the writer."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("small")
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    if kind is not None:
        writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    if tokens is not None:
        writer.add_token_list(tokens)
    writer.add_token_types([3 if token in CONTROL else 4 if token == "<tool>" else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    if eos is not None:
        writer.add_eos_token_id(eos)
    if template is not None:
        writer.add_chat_template(template)
    for add in extra:
        add(writer)
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in SHAPES.items()}
    for name, shape in shapes.items():
        if name in without:
            continue
        values = torch.randn(shape, generator=generator).numpy()
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
            continue
        quantized = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    path = write_gguf(folder / "small.gguf")
    report = convert(ConvertRun(gguf=str(path), output_dir=str(folder / "out" / "model"), sha256=sha256(path)))
    return path, folder / "out" / "model", report


def rotary_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of llama.cpp's rotary pairs (2i, 2i + 1) in transformers' order: all first ones, then all second ones."""
    pairs = weight.view(heads, -1, 2, weight.shape[1])
    return torch.cat([pairs[:, :, 0], pairs[:, :, 1]], dim=1).reshape(weight.shape)


def test_weights_are_the_dequantized_tensors(converted):
    path, folder, report = converted
    saved = load_file(folder / "model.safetensors")
    expected = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name.startswith("blk."):
            _, layer, name, _ = tensor.name.split(".")
            if name in ("attn_q", "attn_k"):
                values = rotary_halves(values, HEADS if name == "attn_q" else KV_HEADS)
            expected[f"model.layers.{layer}.{NAMES[name]}.weight"] = values
        else:
            expected[
                {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[tensor.name[:-7]] + ".weight"
            ] = values
    assert saved.keys() == expected.keys()  # the head is tied
    for name, values in expected.items():
        assert saved[name].dtype == torch.float32 and torch.equal(saved[name], values), name
    assert report["parameters"] == sum(values.numel() for values in expected.values())
    assert report["largest_logit_difference"] <= 1e-3
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]


def test_configuration_and_tokens(converted):
    _, folder, report = converted
    config, generation = AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    assert not hasattr(config, "quantization_config") and config.tie_word_embeddings
    assert config.rope_parameters["rope_theta"] == 100000 and config.max_position_embeddings == 256
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # The metadata say <|endoftext|>; the chat template ends a reply otherwise.
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert report["stop_ids"] == generation.eos_token_id == [0, 2]
    assert config.eos_token_id == 2 and config.pad_token_id == generation.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.model_max_length == 256
    assert tokenizer.tokenize("hi<tool><|im_end|>") == ["hi", "<tool>", "<|im_end|>"]
    template = load_template(Model(path=str(folder)), "chat")
    prompt = template.prompt_ids(template.prompt("hi"))
    assert tokenizer.decode(prompt) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert template.reply_ids("hi")[-2:] == [2, tokenizer.convert_tokens_to_ids("Ċ")]


def test_digits_are_split_first(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted[1])
    assert tokenizer.tokenize("12\n\n1  2") == ["1", "2", "ĊĊ", "1", "ĠĠ", "2"]
    assert tokenizer.tokenize("  a") == ["Ġ", "Ġ", "a"]


def test_qwen2_splits_as_its_tokenizer(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", pre="qwen2")
    built = build_tokenizer(open_gguf(path), path)
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    known = Qwen2TokenizerFast(vocab={token: i for i, token in enumerate(TOKENS)}, merges=merges)
    for text in (*TEXTS, "I'LL say: 12\r\n\r\n  hi (e\u0301)  \n"):
        assert built(text)["input_ids"] == known(text)["input_ids"], text
    assert built.backend_tokenizer.pre_tokenizer.pre_tokenize_str("I'LL hi") == (
        known.backend_tokenizer.pre_tokenizer.pre_tokenize_str("I'LL hi")
    )


def test_a_beginning_token_and_a_second_dtype(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", template=None, extra=[lambda writer: writer.add_add_bos_token(True)])
    report = convert(ConvertRun(gguf=str(path), output_dir=str(tmp_path / "m"), dtype="bfloat16"))
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("hi")["input_ids"] == [1, TOKENS.index("hi")]
    assert {values.dtype for values in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(tmp_path / "m").pad_token == "<|endoftext|>"
    assert report["stop_ids"] == [0] and not report["chat_template"]


def add_unreadable(writer):
    """A tensor in a kind of blocks that no one can dequantize."""
    kind = gguf.GGMLQuantizationType.Q8_1
    block, size = gguf.GGML_QUANT_SIZES[kind]
    values = torch.zeros(INNER, HIDDEN // block * size, dtype=torch.uint8)
    writer.add_tensor("blk.1.ffn_up.weight", values.numpy(), raw_dtype=kind)


def add_misnamed(writer):
    writer.add_tensor("blk.1.ffn_app.weight", torch.zeros(INNER, HIDDEN).numpy())


def refused(path, output) -> str:
    with pytest.raises(UserError) as error:
        convert(ConvertRun(gguf=str(path), output_dir=str(output)))
    assert not output.exists() and not list(output.parent.glob(".*"))
    return str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": None}, "has no tokenizer.ggml.tokens"),
        ({"kind": None}, "tokenizer of the kind None, smollm"),
        ({"architecture": "rwkv7"}, "of the architecture rwkv7, which transformers cannot read"),
        ({"kind": "llama", "pre": "default"}, "tokenizer of the kind llama, default"),
        ({"pre": "unheard-of"}, "gpt2, smollm and gpt2, qwen2"),
        ({"template": None, "eos": None}, "what ends a text"),
        ({"without": ["blk.1.ffn_up"]}, "tensors are missing or would be lost"),
        ({"extra": [lambda w: w.add_tensor("rope_freqs.weight", torch.ones(8).numpy())]}, "or would be lost"),
        ({"without": ["blk.1.ffn_up"], "extra": [add_unreadable]}, "quantized in a way that cannot be read"),
        ({"without": ["blk.1.ffn_up"], "extra": [add_misnamed]}, "no weights for model.layers.1.mlp.up_proj.weight"),
        ({"extra": [lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)]}, "scales its rotary embeddings"),
    ],
)
def test_what_cannot_be_converted(tmp_path, fields, message):
    assert message in refused(write_gguf(tmp_path / "m.gguf", **fields), tmp_path / "out")


def test_a_cut_off_file_at_any_length(tmp_path):
    content = write_gguf(tmp_path / "m.gguf").read_bytes()
    for length in [*range(4, 1500, 7), *range(1500, len(content), 997), len(content) - 32]:
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(UserError, match="cut off or damaged"):
            open_gguf(tmp_path / "cut.gguf")


def test_files_that_are_none(tmp_path, monkeypatch):
    assert "there is no file" in refused(tmp_path / "m.gguf", tmp_path / "out")
    for content in (b"", b"GG", b"{}" * 99):
        (tmp_path / "m.gguf").write_bytes(content)
        assert "is no GGUF file" in refused(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(UserError, match="has the sha256"):
        open_gguf(tmp_path / "m.gguf", "0" * 64)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install -e '.[gguf]'" in refused(tmp_path / "m.gguf", tmp_path / "out")


def test_a_folder_with_files_is_kept(tmp_path, converted):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="is there already"):
        convert(ConvertRun(gguf=str(converted[0]), output_dir=str(tmp_path / "out")))
    assert [entry.name for entry in tmp_path.rglob("*")] == ["out", "mine"]


def test_what_a_killed_conversion_left_is_replaced(tmp_path, converted):
    left = tmp_path / ".out.converting" / "out"
    left.mkdir(parents=True)
    (left / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "out").mkdir()  # empty
    convert(ConvertRun(gguf=str(converted[0]), output_dir=str(tmp_path / "out")))
    assert {entry.name for entry in tmp_path.iterdir()} == {"out"}
    assert [entry.name for entry in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_a_conversion_that_lost_something_is_refused(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf")

    def lossy(model, tokenizer, stop_ids, folder):
        model.model.norm.weight.data = model.model.norm.weight.data * 1.01
        save(model, tokenizer, stop_ids, folder)

    module = sys.modules[convert.__module__]
    save = module._save
    monkeypatch.setattr(module, "_save", lossy)
    assert "logits differ" in refused(path, tmp_path / "out")


def test_the_launcher(tmp_path):
    result = launch("convert.py", "--gguf", tmp_path / "m.gguf", "--output_dir", tmp_path / "out")
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("error: gguf: there is no file")
    with pytest.raises(UserError, match="`sha256`"):
        parse(ConvertRun, ["--gguf", "m.gguf", "--output_dir", "out", "--sha256", "12"])


@pytest.mark.skipif(not REAL.is_dir(), reason="models/smollm2-135m is not there: `make models/smollm2-135m`")
def test_smollm2():
    template = load_template(Model(path=str(REAL)), "chat")
    tokenizer = template.tokenizer
    assert tokenizer.tokenize("12 + 57 = 69") == ["1", "2", "Ġ+", "Ġ", "5", "7", "Ġ=", "Ġ", "6", "9"]
    assert tokenizer.tokenize("a\n\n1.  2") == ["a", "ĊĊ", "1", ".", "ĠĠ", "2"]
    assert template.stop_ids == [2] and tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    ids = template.prompt_ids(template.prompt("What is 2+2?"))
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert tokenizer.decode(ids) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[:3] == [1, 9690, 198] and ids[22:] == [
        4093,
        198,
        1780,
        314,
        216,
        34,
        27,
        34,
        47,
        2,
        198,
        1,
        520,
        9531,
        198,
    ]
