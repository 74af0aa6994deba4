""" The encoder is BERT, early exit is exact, and what it saves is an ordinary Hugging Face folder. """
import json

import numpy as np
import pytest
import torch

import model as model_file
from evaluate import cost
from model import (Bert, BertConfig, MLMHead, PackedAttention, attention, check_sizes, dropout, fast_attention,
                   from_pretrained, named_sizes, pack, default_sizes, pool, save_pretrained)


def hugging_face(config, **changes):
    from transformers import BertConfig as TheirConfig, BertModel
    from model import to_hf
    theirs = BertModel(TheirConfig(**{**vars(config), **changes}), add_pooling_layer=False).eval()
    return theirs, lambda model: theirs.load_state_dict(to_hf(model.state_dict()))


def rows_of(tap, batch, texts):
    """ (N, C) -> one (T, C) a text, in the caller's order """
    return [tap[start:start + len(text)] for start, text in zip(batch.starts, texts)]


@pytest.mark.parametrize("act", ["gelu", "relu", "gelu_new"])
@pytest.mark.parametrize("grad", [True, False])
def test_every_layer_equals_hugging_face(config, texts, act, grad):
    """ Every layer equals the one of transformers to 1e-10 in float64, padded there and packed here. """
    config.hidden_act = act
    torch.manual_seed(0)
    model = Bert(config).eval()
    for p in model.parameters():   # biases and LayerNorm weights too, else errors in them hide
        torch.nn.init.normal_(p, std=0.3)
    theirs, load = hugging_face(config)
    load(model)
    model.double(), theirs.double()
    input_ids = torch.zeros(len(texts), 20, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for i, text in enumerate(texts):
        input_ids[i, :len(text)], mask[i, :len(text)] = torch.from_numpy(text), 1
    batch = pack(texts)
    with torch.set_grad_enabled(grad):
        taps = model(batch, [0, 1, 2, 3, 4])
    with torch.no_grad():
        reference = theirs(input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for tap, hidden in zip(taps.values(), reference, strict=True):
        for ours, row, text in zip(rows_of(tap, batch, texts), hidden, texts):
            torch.testing.assert_close(ours, row[:len(text)], rtol=0, atol=1e-10)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradient_of_the_attention(p):
    """ The backward written by hand equals finite differences in float64, with dropout too. """
    torch.manual_seed(0)
    qkv = torch.randn(9, 18, dtype=torch.float64, requires_grad=True)
    def attend(qkv):
        torch.manual_seed(1)   # the same entries are dropped every time
        return PackedAttention.apply(qkv, [(2, 1), (1, 3), (2, 2)], 2, p)
    assert torch.autograd.gradcheck(attend, qkv)


def test_fast_attention_is_attention():
    """ fast_attention equals attention, in output and gradient, to 1e-12 in float64. """
    torch.manual_seed(0)
    x, weight = torch.randn(9, 18, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    found = []
    for attend in (attention, fast_attention):
        qkv = x.clone().requires_grad_()
        out = attend(qkv, [(2, 1), (1, 3), (2, 2)], 2, 0.0)
        (out * weight).sum().backward()
        found.append((out.detach(), qkv.grad))
    for plain, fast in zip(*found):
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)


def test_defaults_are_berts():
    """ What a config.json leaves out has the value that transformers gives it. """
    from transformers import BertConfig as TheirConfig
    theirs = TheirConfig()
    assert all(value == getattr(theirs, name) for name, value in vars(BertConfig()).items() if hasattr(theirs, name))
    assert BertConfig().layer_norm_eps == 1e-12


def test_grouping_changes_nothing(model, texts):
    """ A text has the same embedding, to rounding, alone and among others, and the caller's order stays. """
    model = model.double()   # in float32 the rounding depends on the machine
    together = model.encode(pack(texts), [2, 4])
    for i, text in enumerate(texts):
        alone = model.encode(pack([text]), [2, 4])
        for layer in (2, 4):
            torch.testing.assert_close(alone[layer][0], together[layer][i], rtol=0, atol=1e-12)


def test_no_token_of_a_pack_is_padding(texts):
    """ A pack has as many tokens as its texts, and positions start anew in every text. """
    batch = pack(texts)
    assert len(batch.input_ids) == sum(map(len, texts)) == sum(B * T for B, T in batch.groups)
    for start, text in zip(batch.starts, texts):
        assert batch.input_ids[start:start + len(text)].tolist() == text.tolist()
        assert batch.position_ids[start:start + len(text)].tolist() == list(range(len(text)))
    with pytest.raises(ValueError, match="without a single token"):
        pack([texts[0], np.array([], dtype=np.int64)])


def test_equally_long_texts_keep_their_order():
    """ In a pack texts of one length stand in the caller's order, on which the masked positions of SMAE rely. """
    lengths = np.random.default_rng(0).integers(3, 6, size=60)
    batch = pack([np.full(n, i) for i, n in enumerate(lengths)])
    want = [i for length in (3, 4, 5) for i in np.flatnonzero(lengths == length).tolist()]
    assert list(dict.fromkeys(batch.text_ids.tolist())) == list(dict.fromkeys(batch.input_ids.tolist())) == want


def test_a_line_of_the_log_by_hand():
    """ 120 steps of 0.5 s are left, so the line says a minute. """
    line = model_file.status(30, 150, ["loss 1.000"], 1e-3, 0.5, 0.5, 1000)
    assert line == "step 30/150 | loss 1.000 | lr 1.0e-03 | norm 0.50 | 500 ms | 2.0k tok/s | eta 1.0m"


def test_fillers_belong_to_nobody(model, texts):
    """ Fillers change no embedding and no gradient, but for rounding, with either pooling. """
    for pooling in ("mean", "cls"):
        model.config.pooling, found = pooling, []
        for multiple in (1, 10):
            batch = pack(texts, multiple=multiple)
            assert len(batch.input_ids) % multiple == 0 and len(batch.starts) == len(texts)
            model.zero_grad()
            embedding = model.encode(batch, [4])[4]
            embedding.square().mean().backward()
            found.append([embedding.detach()] + [p.grad for p in model.parameters()])
        for plain, filled in zip(*found):
            torch.testing.assert_close(filled, plain, rtol=1e-4, atol=1e-6)
    assert len(pack(texts, multiple=64).input_ids) == sum(map(len, texts))   # too few to fill up


def test_early_exit_is_exact_and_runs_nothing_above(model, texts):
    """ layers=[2] equals layers=[2, 4] at layer 2 bit by bit, and the blocks above 2 do not run. """
    batch = pack(texts)
    both = model(batch, [2, 4])
    ran = []
    for n, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(lambda *_, n=n: ran.append(n))
    assert torch.equal(model(batch, [2])[2], both[2])
    assert ran == [1, 2]


def test_encoding_in_bfloat16(model, texts):
    """ Between the layers autocast has bfloat16 in eval mode, float32 in training; the embeddings agree. """
    batch = pack(texts)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(batch, [1, 3])[3].dtype == torch.bfloat16
        found = model.encode(batch, [1, 3])
        assert model.train()(batch, [3])[3].dtype == torch.float32
    with torch.no_grad():
        exact = model.eval().encode(batch, [1, 3])
    for n in (1, 3):
        assert found[n].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(found[n], exact[n]).min() > 0.999


def test_gradient_stops_at_the_tap(model, texts):
    """ A loss on 8 dims of layer 2 gives blocks 3 and 4 no gradient, and dims beyond 8 of the last LayerNorm 0. """
    model.encode(pack(texts), [2])[2][:, :8].square().sum().backward()
    assert all(p.grad is None for block in model.blocks[2:] for p in block.parameters())
    grad = model.blocks[1].norm2.weight.grad
    assert (grad[:8] != 0).all() and (grad[8:] == 0).all()


def test_pooling_by_hand():
    """ Of texts of 2 and 1 tokens the pools are the mean of rows, and the first row. """
    batch = pack([np.array([5, 6]), np.array([7])])                # packed by length: [7], then [5, 6]
    hidden = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 60.0]])   # of tokens 7, 5, 6
    assert pool(hidden, batch, "mean").tolist() == [[3.0, 40.0], [1.0, 10.0]]
    assert pool(hidden, batch, "cls").tolist() == [[2.0, 20.0], [1.0, 10.0]]


def test_dropout_rate_and_scale():
    """ At p = 0.1 dropout zeroes 26/256 of the entries, without stripes, and multiplies the others by 256/230. """
    torch.manual_seed(0)
    y = dropout(torch.ones(2000, 2003), 0.1, True)
    zero = (y == 0).float()
    assert abs(zero.mean() - 26 / 256) < 5e-4 and abs(y.mean() - 1) < 5e-4   # 0.1 and 25/256 are 1.6e-3, 3.9e-3 away
    assert (y[y != 0] == torch.tensor(256 / 230)).all()
    assert zero.mean(0).std() < 0.008 and zero.mean(1).std() < 0.008   # binomial: sqrt(.1 * .9 / 2000) = 0.0067


def test_no_dropout_at_zero():
    """ At p = 0 dropout returns its input. """
    x = torch.randn(5, 7)
    assert torch.equal(dropout(x, 0.0, True), x)


def test_dropout_is_on_in_training_only(config, texts):
    """ In training mode two passes differ, in eval mode they do not. """
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.5
    model, batch = Bert(config), pack(texts)
    assert not torch.equal(model(batch, [4])[4], model(batch, [4])[4])
    model.eval()
    assert torch.equal(model(batch, [4])[4], model(batch, [4])[4])


def plain_bert(bert, texts, mask):
    """ BERT's equations for texts of equal length: mask(x) is the dropout mask, in BERT's four places -> (B, T, C) """
    B, T, C, H = len(texts), len(texts[0]), bert.config.hidden_size, bert.config.num_attention_heads
    x = bert.word.weight[torch.tensor(np.array(texts))] + bert.position.weight[:T] + bert.token_type.weight[0]
    x = bert.norm(x)                                                                          # (B, T, C)
    x = x * mask(x)                                                                           # 1: embeddings
    for block in bert.blocks:
        qkv = x @ block.attention.qkv.weight.T + block.attention.qkv.bias
        q, k, v = (part.reshape(B, T, H, C // H).transpose(1, 2) for part in qkv.chunk(3, -1))   # (B, H, T, D) each
        weights = (q @ k.transpose(2, 3) / (C // H)**0.5).softmax(-1)
        mixed = (weights * mask(weights)) @ v                                                 # 2: inside the attention
        mixed = block.attention.out(mixed.transpose(1, 2).reshape(B, T, C))
        x = block.norm1(x + mixed * mask(mixed))                                              # 3: after the attention
        mlp = block.down(torch.nn.functional.gelu(block.up(x)))
        x = block.norm2(x + mlp * mask(mlp))                                                  # 4: after the MLP
    return x


def test_dropout_of_the_plain_attention():
    """ `attention`, which trains on a GPU, drops weights at rate p and scales the others by 1 / (1 - p):
    with values of 1 the outputs are 1 in the mean, and vary. """
    torch.manual_seed(0)
    qkv = torch.cat([torch.randn(4000, 16), torch.ones(4000, 8)], dim=1)
    kept = attention(qkv, [(1000, 4)], 2, 0.0)
    torch.testing.assert_close(kept, torch.ones(4000, 8))
    dropped = attention(qkv, [(1000, 4)], 2, 0.5)
    assert abs(dropped.mean() - 1) < 0.05 and dropped.std() > 0.3


def test_the_head_has_the_activation_of_the_model(config):
    """ A BERT with relu has it in the MLM head, too. """
    config.hidden_act = "relu"
    head, x = MLMHead(config), torch.randn(5, config.hidden_size)
    torch.testing.assert_close(head.transform(x), head.norm(head.dense(x).relu()))


def test_dropout_is_where_bert_has_it(config, monkeypatch):
    """ In training the encoder equals BERT's equations with the same masks in all four places, to 1e-10 in float64. """
    config.hidden_dropout_prob, config.attention_probs_dropout_prob = 0.3, 0.4
    torch.manual_seed(0)
    bert, texts = Bert(config).double().train(), list(np.random.default_rng(0).integers(5, 97, size=(3, 7)))
    drawn, rates, draw = [], [], model_file.dropout_mask
    def dropout_mask(size, p, dtype):
        rates.append(p), drawn.append(draw(size, p, dtype))
        return drawn[-1]
    monkeypatch.setattr(model_file, "dropout_mask", dropout_mask)
    found = bert(pack(texts), [4])[4]
    masks = iter(drawn)
    want = plain_bert(bert, texts, lambda x: next(masks).view(x.shape))
    torch.testing.assert_close(found, want.view(found.shape), rtol=0, atol=1e-10)
    assert next(masks, None) is None and rates == [0.3] + 4 * [0.4, 0.3, 0.3]


def test_where_weights_start(config):
    """ Matrices start at the standard deviation of the configuration, biases at 0, LayerNorms at 1 and 0. """
    torch.manual_seed(0)
    config.initializer_range = 0.15
    for name, p in Bert(config).named_parameters():
        if p.dim() == 2:
            assert abs(p.mean()) < 0.03 and p.std().item() == pytest.approx(0.15, rel=0.2), name
        else:
            assert (p == float("norm" in name and name.endswith("weight"))).all(), name


def test_fast_dtype(monkeypatch):
    """ Without a GPU bfloat16 is the fast type where the CPU has one of two instruction sets for it, else float32. """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for has, want in (({}, "float32"), ({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"),
                      ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
        assert model_file.fast_dtype() == want


def test_save_and_load_round_trip(model, texts, tokenizer, tmp_path):
    """ AutoModel and from_pretrained give the saved model's outputs; sizes and use are in config.json. """
    from transformers import AutoModel, AutoTokenizer
    model.config.sizes, model.config.pooling, model.config.similarity = ((1, 8), (4, 48)), "cls", "dot"
    save_pretrained(model, tokenizer, tmp_path / "m")
    ours = from_pretrained(tmp_path / "m")
    assert ours.config == model.config and not any(module.training for module in ours.modules())
    batch = pack(texts)
    assert torch.equal(ours(batch, [4])[4], model(batch, [4])[4])
    theirs = AutoModel.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        for text, row in zip(texts, rows_of(model(batch, [4])[4], batch, texts)):
            found = theirs(torch.from_numpy(text)[None]).last_hidden_state[0]
            torch.testing.assert_close(found, row, rtol=0, atol=1e-5)
    found = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert found.tokenize("the apple") == tokenizer.tokenize("the apple")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["sizes"] == [[1, 8], [4, 48]]


@pytest.mark.parametrize("form", ["head", "old names", "bin"])
def test_loads_the_forms_checkpoints_come_in(model, texts, tokenizer, tmp_path, form):
    """ A checkpoint loads with the bert. prefix and heads, with gamma and beta, and as pytorch_model.bin. """
    from safetensors.torch import load_file, save_file
    save_pretrained(model, tokenizer, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    if form == "head":
        state = {f"bert.{name}": t for name, t in state.items()}
        state |= {"cls.predictions.bias": torch.ones(97), "bert.pooler.dense.weight": torch.ones(48, 48),
                  "bert.embeddings.position_ids": torch.arange(40)}
    if form == "old names":
        state = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
                 for name, t in state.items()}
    (tmp_path / "model.safetensors").unlink()
    if form == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors")
    batch = pack(texts)
    assert torch.equal(from_pretrained(tmp_path)(batch, [4])[4], model(batch, [4])[4])


@pytest.mark.parametrize("change, message", [({"model_type": "roberta"}, "model_type 'roberta'"),
                                             ({"position_embedding_type": "relative_key"}, "relative_key positions"),
                                             ({"hidden_act": "mish"}, "hidden_act 'mish'"),
                                             ({"pooling": "median"}, "pooling 'median' .* known are mean, cls"),
                                             ({"similarity": "l2"}, "similarity 'l2' .* known are cosine, dot"),
                                             ({"num_hidden_layers": 5}, "KeyError: 'encoder.layer.4"),
                                             ({"num_attention_heads": 5}, "of one BERT .AssertionError: 5 heads"),
                                             ({"num_attention_heads": -3}, "of one BERT .AssertionError: -3 heads"),
                                             ({"hidden_act": ["gelu"]}, "hidden_act \\['gelu'\\] is not supported"),
                                             ({"pooling": {}}, "pooling {} is not supported"),
                                             ({"num_attention_heads": None}, "are not of one BERT"),
                                             ({"hidden_size": "48"}, "are not of one BERT"),
                                             ({"sizes": [[1]]}, "are not of one BERT"),
                                             ({"vocab_size": 98}, "word.weight")])
def test_refuses_what_is_not_bert(model, tokenizer, tmp_path, change, message):
    """ A folder that is no BERT of ours is refused with a clear line. """
    save_pretrained(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


def test_what_a_hand_may_write_in_config_json(model, tokenizer, tmp_path):
    """ A size that was added without a name counts, and null for the sizes is none. """
    save_pretrained(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, want in (({"sizes": [[1, 8], [4, 48]], "size_names": ["S"]}, {(1, 8): "S", (4, 48): ""}),
                         ({"sizes": None, "size_names": None}, default_sizes(model.config))):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        assert named_sizes(from_pretrained(tmp_path).config) == want


def test_whoever_can_read_the_folder_can_read_the_weights(model, tokenizer, tmp_path):
    """ All files have the same permissions. """
    save_pretrained(model, tokenizer, tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.glob("*.*")}) == 1


def test_dropout_below_1_is_finite():
    """ The largest share that the flag takes leaves some entries. """
    assert model_file.dropout_mask(9, 0.999, torch.float32).isfinite().all()


def test_sizes_keep_their_names(model, tokenizer, tmp_path):
    """ The names of the sizes come back from config.json; an old config.json without names loads as well. """
    assert named_sizes(model.config) == default_sizes(model.config)   # trained for no size: the paper's
    model.config.sizes, model.config.size_names = ((1, 8), (3, 9), (4, 48)), ("Demi", "", "Trenta")
    save_pretrained(model, tokenizer, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["sizes"] == [[1, 8], [3, 9], [4, 48]] and saved["size_names"] == ["Demi", "", "Trenta"]
    loaded = from_pretrained(tmp_path).config
    assert loaded == model.config and named_sizes(loaded) == {(1, 8): "Demi", (3, 9): "", (4, 48): "Trenta"}
    del saved["size_names"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert named_sizes(from_pretrained(tmp_path).config) == {(1, 8): "", (3, 9): "", (4, 48): ""}


def test_poolings_are_one_table(model, texts, tokenizer, tmp_path, monkeypatch):
    """ A pooling that is added to POOLINGS, here the last token, is what encode computes and from_pretrained takes. """
    monkeypatch.setitem(model_file.POOLINGS, "last", lambda hidden, batch: hidden[batch.starts + lengths - 1])
    model.config.pooling, lengths, batch = "last", torch.tensor([len(text) for text in texts]), pack(texts)
    found = model.encode(batch, [2])[2]
    for row, tap in zip(found, rows_of(model(batch, [2])[2], batch, texts), strict=True):
        assert torch.equal(row, tap[-1])
    save_pretrained(model, tokenizer, tmp_path)
    assert from_pretrained(tmp_path).config.pooling == "last"


def test_sizes_of_the_paper():
    """ BERT-base has the paper's six sizes and parameter counts, in millions. """
    with torch.device("meta"):
        model = Bert(BertConfig())
    sizes = tuple(default_sizes(model.config))
    assert sizes == ((2, 32), (4, 64), (6, 128), (8, 256), (10, 512), (12, 768))
    small = default_sizes(BertConfig(num_hidden_layers=6, hidden_size=192))
    assert small == {(1, 8): "Demi", (2, 16): "Short", (3, 32): "Tall", (4, 64): "Grande", (5, 128): "Venti",
                     (6, 192): "Trenta"}
    parameters = [r["value"] / 1e6 for r in cost(model, sizes) if r["metric"] == "parameters"]
    assert [round(millions, 1) for millions in parameters] == [38.0, 52.2, 66.4, 80.5, 94.7, 108.9]
    assert check_sizes(((6, 128), (2, 32), (6, 128)), model.config) == ((2, 32), (6, 128))   # sorted, each once
    with pytest.raises(ValueError, match="layer 14 but the model has 12 layers; use a layer between 1 and 12"):
        check_sizes(((14, 32),), model.config)
    with pytest.raises(ValueError, match="800 dims but the model has 768"):
        check_sizes(((2, 800),), model.config)
