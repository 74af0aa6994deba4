""" The encoder is BERT, early exit is exact, checkpoints load in the forms they lie around in or are refused. """
import json, math, re, shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from model import (Bert, Dropout, check_sizes, default_sizes, hf_name, load_model, load_weights, new_config, pack,
                   parse_sizes, pool, read_modules, read_weights, run_script, save_pretrained, sum_and_clip)
from pretrain_smae import MLMHead

def same(module, other):
    """ Are all weights the same, bit by bit? """
    return all(map(torch.equal, module.state_dict().values(), other.state_dict().values()))

# ---- the encoder -----------------------------------------------------------------------------------------------------
def theirs_of(model):
    """ our Bert -> transformers' BertModel with the same weights, in float64 """
    from transformers import BertModel
    model.config._attn_implementation = "eager"
    theirs = BertModel(model.config, add_pooling_layer=False).double().train(model.training)
    theirs.load_state_dict({hf_name(name): tensor for name, tensor in model.state_dict().items()})
    return theirs

@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_every_layer_equals_hugging_face(config, texts, act):
    """ Every layer, and every gradient of a loss on all, is that of transformers, which pads, to 1e-10 in float64. """
    config.hidden_act = act
    torch.manual_seed(0)
    model = Bert(config).double().eval()
    for p in model.parameters():   # biases and LayerNorm weights too, else errors in them hide
        torch.nn.init.normal_(p, std=0.3)
    theirs, batch = theirs_of(model), pack(texts)
    ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.from_numpy, texts)), batch_first=True)
    mask = torch.arange(20) < torch.tensor(list(map(len, texts)))[:, None]
    reference, loss, their_loss = theirs(ids, attention_mask=mask, output_hidden_states=True).hidden_states, 0, 0
    for tap, hidden in zip(model(batch, [0, 1, 2, 3, 4]).values(), reference, strict=True):
        for start, their_row, text in zip(batch.starts, hidden, texts):
            row, their_row = tap[start:start + len(text)], their_row[:len(text)]
            torch.testing.assert_close(row, their_row, rtol=0, atol=1e-10)
            weight = torch.randn(row.shape, dtype=row.dtype)
            loss, their_loss = loss + (row * weight).sum(), their_loss + (their_row * weight).sum()
    loss.backward(), their_loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in model.named_parameters():   # the bias of a key changes nothing, and is not trained
        grad = torch.zeros_like(p) if name.endswith("key.bias") and p.grad is None else p.grad
        torch.testing.assert_close(grad, grads[hf_name(name)], rtol=1e-10, atol=1e-10)

def test_dropout_is_where_bert_has_it(config, monkeypatch):
    """ In training, with the same masks in the same order, the encoder equals transformers' BERT to 1e-10; else there
    is no dropout. """
    config.hidden_dropout_prob, config.attention_probs_dropout_prob = 0.3, 0.4
    torch.manual_seed(0)
    model, texts, rates = Bert(config).double().train(), np.random.default_rng(0).integers(5, 97, size=(3, 7)), []
    def dropout(x, p, training, inplace=False):
        kept = torch.rand(x.numel(), generator=torch.Generator().manual_seed(len(rates))) >= p
        rates.append(p if training else 0.0)
        return x * kept.view(x.shape) / (1 - p) if training else x
    def plain_attention(q, k, v, dropout_p):
        return dropout((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1), dropout_p, True) @ v
    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    monkeypatch.setattr(Dropout, "forward", lambda self, x: dropout(x, self.p, self.training))
    found, ours = model(pack(list(texts)), [4])[4], rates.copy()
    rates.clear()
    want = theirs_of(model)(torch.from_numpy(texts)).last_hidden_state
    torch.testing.assert_close(found, want.view(found.shape), rtol=0, atol=1e-10)
    assert ours == rates == [0.3] + 4 * [0.4, 0.3, 0.3]
    rates.clear(), model.eval()(pack(list(texts)), [4])
    assert rates == 13 * [0.0]

def test_fast_dropout():
    """ Each byte of a random number drops its entry with probability 26/256, for 0.1; the others make up for it. """
    dropped = Dropout(0.1).double().train()(torch.ones(80_001, dtype=torch.float64))
    assert (dropped[:-1].view(-1, 8) == 0).double().mean(0).tolist() == pytest.approx([26 / 256] * 8, abs=0.015)
    assert dropped.unique().tolist() == [0, 256 / 230] and torch.equal(Dropout(0.1).eval()(dropped), dropped)

def test_pack():
    """ The worked example of Pack's docstring comes out, and equally long texts keep the caller's order. """
    batch = pack([np.full(n, i) for i, n in ((10, 4), (11, 2), (12, 4))])
    assert batch.input_ids.tolist() == [11] * 2 + [10] * 4 + [12] * 4
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 2, 3] and batch.starts.tolist() == [2, 0, 6]
    assert batch.text_ids.tolist() == [1, 1, 0, 0, 0, 0, 2, 2, 2, 2] and batch.groups == [(1, 2), (2, 4)]
    assert pool(torch.ones(10, 4).bfloat16(), batch, "mean").dtype == torch.float32   # scores need the digits
    order = pack([np.full(3 + i % 3, i) for i in range(60)]).input_ids   # the masked positions of SMAE rely on it
    assert list(dict.fromkeys(order.tolist())) == sorted(range(60), key=lambda i: i % 3)

def test_early_exit_is_exact_and_runs_nothing_above(model, texts):
    """ layers=[2] equals layers=[2, 4] at layer 2 bit by bit, and the blocks above 2 do not run. """
    batch, ran = pack(texts), []
    both = model(batch, [2, 4])
    for block in model.blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    assert torch.equal(model(batch, [2])[2], both[2]) and len(ran) == 2

def test_sizes():
    """ A BERT has the paper's sizes, or their shares; check_sizes sorts them and refuses what the model lacks. """
    assert new_config().sizes == ((2, 32), (4, 64), (6, 128), (8, 256), (10, 512), (12, 768))
    assert default_sizes(6, 192) == ((1, 8), (2, 16), (3, 32), (4, 64), (5, 128), (6, 192))
    assert new_config(sizes=[[1, 8], [2, 9]]).sizes == ((1, 8), (2, 9))   # as JSON has them
    assert parse_sizes("2:32,12:768") == ((2, 32), (12, 768))
    for text in ("", "2", "2:32,", "2:a", "2:3:4"):
        pytest.raises(ValueError, parse_sizes, text)
    assert check_sizes(((6, 128), (2, 32), (6, 128)), new_config()) == ((2, 32), (6, 128))
    for layer, dim in ((13, 32), (0, 32), (2, 769), (2, 0)):
        with pytest.raises(ValueError, match=f"--sizes 2:32,{layer}:{dim}: .* 12 layers and 768 dims"):
            check_sizes(((2, 32), (layer, dim)), new_config())

# ---- Hugging Face folders --------------------------------------------------------------------------------------------
CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer_config.json", "model.safetensors"
MODES, SIMILARITY = "1_Pooling/config.json", "config_sentence_transformers.json"
LENGTH = "sentence_bert_config.json"
MEAN, CLS, ROOT = (f"pooling_mode_{mode}" for mode in ("mean_tokens", "cls_token", "mean_sqrt_len_tokens"))

def write_files(folder, files):
    """ {name: text or JSON; None deletes; of configs the changes; of WEIGHTS a function that gives {file: weights}} """
    for name, content in files.items():
        path = folder / name
        if callable(content):
            new = content(load_file(path))
            path.unlink()
            for file, weights in new.items():
                (torch.save if file.endswith(".bin") else save_file)(weights, folder / file)
        elif content is None:
            path.unlink()
        else:
            if name in (CONFIG, TOKENIZER) and isinstance(content, dict):
                content = json.loads(path.read_text()) | content
            path.parent.mkdir(exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))

@pytest.fixture
def plain(bert_folder, tmp_path):
    """ a BERT as other programs write it: nothing says how to use it """
    folder = shutil.copytree(bert_folder, tmp_path / "plain")
    config = json.loads((folder / CONFIG).read_text())
    for key in ("sizes", "pooling", "similarity", "query_prompt", "passage_prompt"):
        del config[key]
    write_files(folder, {CONFIG: json.dumps(config), "modules.json": None, SIMILARITY: None, MODES: None, LENGTH: None})
    return folder

def test_save_and_load_round_trip(model, texts, tokenizer, tmp_path, monkeypatch):
    """ load_model and AutoModel give the saved model; sizes and its use come back, whatever other files say. """
    from transformers import AutoModel
    ways = {"sizes": ((1, 8), (4, 40)), "pooling": "cls", "similarity": "dot", "query_prompt": "q"}
    model = Bert(new_config(**model.config.to_dict() | ways | {"vocab_size": 300})).eval()
    monkeypatch.setattr(tokenizer, "model_max_length", 21)
    save_pretrained(model, tokenizer, tmp_path)
    write_files(tmp_path, {SIMILARITY: {"similarity_fn_name": "cosine", "prompts": {"query": ""}}, MODES: {MEAN: True}})
    ours, loaded = load_model(str(tmp_path))
    assert same(ours, model) and not same(ours, Bert(model.config)) and not ours.blocks[0].dropout.training
    assert {name: getattr(ours.config, name) for name in ways} == ways and loaded.model_max_length == 21
    assert loaded.tokenize("The apple") == tokenizer.tokenize("the apple")
    theirs, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    found = theirs.eval()(torch.from_numpy(texts[2])[None]).last_hidden_state[0]
    torch.testing.assert_close(found, ours(pack(texts[2:3]), [4])[4], rtol=0, atol=1e-5)
    assert not info["missing_keys"] and not info["unexpected_keys"]

def test_the_head_of_transformers(model, texts, tmp_path, tokenizer):
    """ A BERT that we save with an MLM head has our logits in transformers, and both come back from what it saves. """
    from transformers import BertForMaskedLM
    model = Bert(new_config(**model.config.to_dict() | {"vocab_size": 300, "hidden_act": "relu"})).eval()
    head, loaded = MLMHead(model.config), MLMHead(model.config)
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.3)
    save_pretrained(model, tokenizer, tmp_path / "ours", head)
    theirs, info = BertForMaskedLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    want = head(model(pack(texts[:1]), [4])[4]) @ model.word.weight.T + head.word_bias
    torch.testing.assert_close(theirs.eval()(torch.from_numpy(texts[0])[None]).logits[0], want, rtol=0, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs"), tokenizer.save_pretrained(tmp_path / "theirs")
    load_weights(loaded, read_weights(tmp_path / "theirs"))
    assert same(loaded, head) and same(load_model(str(tmp_path / "theirs"))[0], model)

def prefixed(*prefixes, **more):
    return lambda state: {WEIGHTS: {p + name: t.clone() for name, t in state.items() for p in prefixes} | more}

def in_two(file):
    return lambda state: {file.format(i): dict(list(state.items())[i - 1::2]) for i in (1, 2)}

OLD, HEADS = {"Norm.weight": "Norm.gamma", "Norm.bias": "Norm.beta"}, {"cls.predictions.bias": torch.ones(9)}
FORMS = {prefix: prefixed(prefix) for prefix in ("module.bert.", "module.", "0.auto_model.", "model.")} | {
    "2018": lambda state: {WEIGHTS: {re.sub("Norm.*", lambda m: OLD[m[0]], name): t for name, t in state.items()}},
    "bin": lambda state: {"pytorch_model.bin": state | {"embeddings.position_ids": torch.arange(64)}},
    "shards": in_two("model-0000{}-of-00002.safetensors"), "bins": in_two("pytorch_model-0000{}-of-00002.bin"),
    "heads": prefixed("bert.", **HEADS)}

@pytest.mark.parametrize("form", FORMS)
def test_loads_the_forms_checkpoints_come_in(plain, bert_folder, form):
    """ Every form gives the same weights. """
    write_files(plain, {WEIGHTS: FORMS[form]})
    assert same(load_model(str(plain))[0], load_model(bert_folder)[0])

def test_half_precision_and_one_token_type(plain, bert_folder, tmp_path):
    """ Half precision becomes float32, also to others once it is saved; a BERT with one token type loads as well. """
    from transformers import AutoModel
    write_files(plain, {CONFIG: {"dtype": "float16", "type_vocab_size": 1}, WEIGHTS: lambda state: {WEIGHTS: {
        name: (t[:1] if name == hf_name("token_type.weight") else t).half() for name, t in state.items()}}})
    (model, tokenizer), (want, _) = load_model(str(plain)), load_model(bert_folder)
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, want.get_parameter(name)[:len(p)].half().float())
    save_pretrained(model, tokenizer, tmp_path / "again")
    assert AutoModel.from_pretrained(tmp_path / "again").dtype == torch.float32

def test_what_is_downloaded(monkeypatch):
    """ Of a name on the hub come the weights and the small files, of old folders of sentence-transformers too. """
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **flags: asked.append(flags) or name)
    assert str(read_modules("someone/bert")[0]) == "someone/bert"
    wanted = [CONFIG, "vocab.txt", WEIGHTS, "model-00001-of-00002.safetensors", "pytorch_model.bin", MODES,
              "0_Transformer/pytorch_model.bin", "0_Transformer/model.safetensors"]
    others = ["tf_model.h5", "onnx/model.onnx", "openvino/openvino_model.bin", "training_args.bin", "optimizer.pt"]
    assert list(huggingface_hub.utils.filter_repo_objects(wanted + others, **asked[0])) == wanted

def modules(*kinds, path=""):   # path: where the Transformer is
    return [{"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}" if i else path}
            for i, kind in enumerate(kinds)]

DOT = {"similarity_fn_name": "dot"}
@pytest.mark.parametrize("files, overrides, want", [
    ({}, {}, ("mean", "cosine")), ({}, {"pooling": "cls", "similarity": "dot"}, ("cls", "dot")),
    ({SIMILARITY: DOT}, {}, ("mean", "dot")), ({SIMILARITY: DOT}, {"similarity": "cosine"}, ("mean", "cosine")),
    ({SIMILARITY: DOT, "modules.json": modules("Transformer", "Normalize")}, {}, ("mean", "cosine")),
    ({SIMILARITY: {"similarity_fn_name": None}, MODES: {CLS: True, MEAN: False}}, {}, ("cls", "cosine")),
    ({MODES: {"pooling_mode": "cls"}}, {}, ("cls", "cosine")),
    ({MODES: {ROOT: True}}, {"pooling": "cls"}, ("cls", "cosine"))])
def test_pooling_and_similarity_of_foreign_folders(plain, capsys, files, overrides, want):
    """ Both are those of sentence-transformers' files, or the overrides; if no file says it, we do. """
    write_files(plain, files)
    config = load_model(str(plain), **overrides)[0].config
    assert (config.pooling, config.similarity) == want
    assert ("not say how to pool" in capsys.readouterr().out) == (MODES not in files and "pooling" not in overrides)

@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_length_prompts_and_path_of_sentence_transformers(plain, bert_folder, tmp_path, place):
    """ Length and prompts come from the folder's own files, whether the BERT lies in it or below, as it once did. """
    folder, length = tmp_path / "theirs", {"max_seq_length": 6}
    shutil.copytree(plain, folder / place)
    write_files(folder, {f"{place or '.'}/{LENGTH}": length, MODES: {CLS: True},
                         "modules.json": modules("Transformer", "Pooling", path=place),
                         SIMILARITY: {"prompts": {"query": "query: ", "document": "passage: "}}})
    model, tokenizer = load_model(str(folder))
    assert same(model, load_model(bert_folder)[0]) and tokenizer.model_max_length == 6
    ways = model.config.pooling, model.config.query_prompt, model.config.passage_prompt
    assert ways == ("cls", "query: ", "passage: ")
    assert [load_model(str(folder), max_length=n)[1].model_max_length for n in (5, 99)] == [5, 64]   # its positions

UP, WORD = hf_name("blocks.2.up.weight"), hf_name("word.weight")
@pytest.mark.parametrize("files, message", [
    ({CONFIG: {"model_type": "roberta"}}, "model_type roberta"), ({CONFIG: {"hidden_act": "gelu_new"}}, "'gelu_new'"),
    ({CONFIG: {"position_embedding_type": "relative_key"}}, "relative_key positions"),
    ({CONFIG: {"num_hidden_layers": 4}}, "KeyError: 'encoder.layer.3"), ({CONFIG: None}, "model_type None"),
    ({CONFIG: {"is_decoder": True}}, "no BERT encoder"), ({CONFIG: '{"half": '}, "JSONDecodeError"),
    ({WEIGHTS: lambda state: {WEIGHTS: {name: t for name, t in state.items() if name != UP}}}, f"KeyError: '{UP}'"),
    ({WEIGHTS: lambda state: {WEIGHTS: state | {UP: state[UP].to(torch.int8)}}}, r"torch.int8\) is quantised"),
    ({WEIGHTS: prefixed("query.", "passage.")}, "its weights hold 2 BERTs"),
    ({WEIGHTS: None}, "its weights hold 0 BERTs"), ({WEIGHTS: "no weights"}, "SafetensorError"),
    ({WEIGHTS: lambda state: {WEIGHTS: state | {UP: state[UP] * math.nan}}}, "not finite"),
    ({"adapter_config.json": {}}, "an adapter to merge first"),
    ({MODES: {MEAN: True, "include_prompt": False}, SIMILARITY: {"prompts": {"query": "q"}}}, "leaves .* prompts out"),
    ({"modules.json": modules("Pooling", "Dense")}, "asks for Dense"),
    ({"tokenizer.json": None, TOKENIZER: None}, "5 words in the tokenizer, .* copy its own"),
    ({CONFIG: {"vocab_size": 99}, WEIGHTS: lambda state: {WEIGHTS: state | {WORD: state[WORD][:99].clone()}}},
     "words in the tokenizer, 99 in the model: .*resize_token_embeddings"),
    ({TOKENIZER: {"do_lower_case": False}, LENGTH: {"do_lower_case": True}}, "do_lower_case"),
    ({MODES: {ROOT: True, MEAN: False}}, f"pooling {ROOT} .* unknown"),
    ({MODES: {"pooling_mode": "weightedmean"}}, "weightedmean"), ({MODES: {CLS: True, MEAN: True}}, r"cls\+mean"),
    ({SIMILARITY: {"similarity_fn_name": "l2"}}, "similarity l2")])
def test_what_is_refused(plain, files, message):
    """ A folder that is no BERT of ours, or that is broken, is refused in one line that names it and says why. """
    write_files(plain, files)
    with pytest.raises(ValueError, match=f"{plain}: no BERT that can be read .*{message}") as error:
        load_model(str(plain))
    assert "\n" not in str(error.value)

# ---- what both training scripts share --------------------------------------------------------------------------------
def test_sum_and_clip(capsys):
    """ The gradient has norm 1 at most; one that is not finite ends the run and names the terms that are not; a loss or
    a gradient of 0 in the first step is a warning. """
    p, one, nan = torch.nn.Parameter(torch.zeros(2)), torch.tensor(1.0), torch.tensor(math.nan)
    def clip(grad, step, **terms):
        p.grad = torch.tensor(grad)
        return sum_and_clip([p], step, terms).item()
    for grad, norm, want in (([3.0, 4.0], 5, [0.6, 0.8]), ([0.3, 0.4], 0.5, [0.3, 0.4])):
        assert clip(grad, 0, loss=one) == pytest.approx(norm) and p.grad.tolist() == pytest.approx(want)
    for terms, said in (({"loss": one, "b": nan, "c": one / 0}, "b, c"), ({"loss": one}, "the gradient")):
        with pytest.raises(FloatingPointError, match=f"step 7: not finite: {said}; lower --learning_rate"):
            clip([1.0, math.nan], 6, **terms)
    assert clip([0.0, 0.0], 1, loss=one) == 0 and not capsys.readouterr().err
    for grad, loss in (([0.0, 0.0], one), ([1.0, 1.0], 0 * one)):
        clip(grad, 0, loss=loss)
        assert capsys.readouterr().err.startswith("warning: step 1 has nothing to learn from")

def test_run_script(capsys):
    """ What the user can mend, as a flag that is negative or NaN, is one line and exit status 2; of a bug the traceback
    stays. """
    def main(error):
        raise error("two\nlines")
    for error in (ValueError, FileNotFoundError, FloatingPointError):
        with pytest.raises(SystemExit, match="2"):
            run_script(main, lambda: error)
        assert capsys.readouterr().err == "error: two lines\n"
    for bug in (KeyError, AssertionError, RuntimeError, TypeError):
        pytest.raises(bug, run_script, main, lambda: bug)
    for number in (-1, -0.5, math.nan):
        with pytest.raises(SystemExit, match="2"):   # and main does not run: it would raise args
            run_script(main, lambda: SimpleNamespace(dropout=0.0, negatives=number))
        assert capsys.readouterr().err.startswith(f"error: --negatives {number}: ")
