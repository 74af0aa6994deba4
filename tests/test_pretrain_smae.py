""" SMAE: the loss as a loop that reads like the equations, its parts, and whole runs on a few short documents. """
import gzip, json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data, finetune_srl, pretrain_smae
from conftest import LINES, assert_frozen, learned, plain_training, set_weights, write_jsonl
from model import STATE, Bert, load_model, pack
from pretrain_smae import MLMHead, SMAE, build_model, main, parse_args, smae_loss, vocabulary_loss

SIZES = (1, 4), (2, 8), (3, 16), (4, 48)
class Tokenizer:
    """ 97 words; a third of them go on with a word """
    cls_token_id, sep_token_id, mask_token_id = 2, 3, 4
    def __len__(self):
        return 97
    def convert_ids_to_tokens(self, ids):
        return [f"##{i}" if i > 4 and i % 3 == 0 else f"{i}" for i in ids]

@pytest.fixture
def smae(config):
    """ float64, no weight at its usual start, the decoder no copy of the first block """
    bert = Bert(config)
    model = SMAE(set_weights(bert), set_weights(MLMHead(config))).double().train()
    model.decoder.load_state_dict(bert.blocks[1].state_dict())
    return model

@pytest.fixture
def batch(frozen_texts):
    """ 15 texts, masked twice """
    masked = data.smae_batch(frozen_texts, 16, (0.2, 0.4), Tokenizer(), [1, 2, 3])
    return pack(masked.texts), masked

# ---- the method: a literal loop --------------------------------------------------------------------------------------
def literal_loss(model, masked, sizes, objective):
    """ SMAE as its equations stand: text by text, size by size, with the words' logits at all positions. """
    bert, decoder, head = model.bert, model.decoder, model.head
    ends = np.cumsum([len(text) for text in masked.texts])
    def by_text(row):                                               # (N,) -> a row for each text
        return np.split(row, ends[:-1])

    def transform(x):                                               # (..., D) -> (..., C)
        return head.norm(F.gelu(x @ head.dense.weight[:, :x.shape[-1]].T + head.dense.bias))

    def guess(x, text, positions):                                  # -> [-log probability of each hidden word]
        logits = transform(x) @ bert.word.weight.T + head.word_bias                            # (T, V)
        return [-(logits[t].exp() / logits[t].exp().sum())[text[t]].log() for t in positions]

    hidden = np.zeros((2, ends[-1]), bool)                          # from the encoder, from the decoder
    hidden[0, masked.encoder_positions] = hidden[1, masked.decoder_positions] = True
    losses = []
    for layer, dim in sizes:
        mlm, mae = [], []
        for text, encoder_ids, decoder_ids, hidden_from_encoder, hidden_from_decoder in zip(
                masked.texts, by_text(masked.encoder_ids), by_text(masked.decoder_ids), *map(by_text, hidden)):
            h = bert(pack([encoder_ids]), [layer])[layer][:, :dim]                             # (T, D)
            mlm += guess(h, text, np.flatnonzero(hidden_from_encoder))
            x = bert.embed(pack([decoder_ids]))                                                # (T, C), layer 0
            x = torch.cat([transform(h[:1]), x[1:]])                # the bottleneck in place of [CLS]
            mae += guess(decoder(x, [(1, len(x))]), text, np.flatnonzero(hidden_from_decoder))
        mlm, mae = sum(mlm) / len(mlm), sum(mae) / len(mae)
        losses.append((mlm + mae) / 2 if objective == "smae" else mlm)
    return sum(losses) / len(losses)

@pytest.mark.parametrize("objective", ["smae", "mlm"])
def test_loss_is_the_literal_loop(smae, batch, objective):
    """ smae_loss and all its gradients are those of the literal loop, to 1e-10 in float64. """
    want = literal_loss(smae, batch[1], SIZES, objective)
    loss, terms = smae_loss(smae, *batch, SIZES, objective)
    found, wanted = (torch.autograd.grad(result, learned(smae), allow_unused=True) for result in (loss, want))
    for found, wanted in zip((loss, *found), (want, *wanted), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
        assert wanted is None and objective == "mlm" or wanted.abs().max() > 1e-4
    assert list(terms) == [f"{kind} {n}:{d}" for n, d in SIZES for kind in ("mlm", "mae")[:1 + (objective == "smae")]]
    assert loss.item() == pytest.approx(sum(terms.values()).item() / len(terms), abs=1e-12)

@pytest.mark.parametrize("objective", ["smae", "mlm"])
def test_frozen_figures(smae, batch, objective):
    """ Loss and gradients are those of earlier versions of this program, to 1e-12 in float64. """
    loss, _ = smae_loss(smae, *batch, SIZES, objective)
    loss.backward()
    assert_frozen(objective, loss, smae)

@pytest.mark.parametrize("dtype, digits", [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 2 ** -7)])
def test_vocabulary_loss_is_cross_entropy(smae, dtype, digits):
    """ vocabulary_loss equals F.cross_entropy of plain logits in float64, in value and gradients, to the digits of its
    dtype (bfloat16 by autocast has 8 bits), also for more rows than a chunk has. Where texts are too short to hide a
    token, all of them are 0, not NaN. """
    torch.manual_seed(0)
    rows, labels = torch.randn(2500, 16), torch.randint(97, (2500,))
    E, bias = smae.bert.word.weight, smae.head.word_bias
    def plain(model, hidden, labels):
        return F.cross_entropy(F.linear(model.head(hidden), E, bias), labels)

    def values(function, count=2500):
        loss = function(smae, hidden := rows[:count].to(E.dtype).requires_grad_(), labels[:count])
        return [loss, *torch.autograd.grad(loss, [hidden, E, bias, *smae.head.dense.parameters()])]

    wanted = values(plain)
    smae.to(torch.float64 if dtype == "float64" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        for found, want in zip(values(vocabulary_loss), wanted, strict=True):
            assert (found - want).norm() < digits * want.norm()
        assert not any(found.any() for found in values(vocabulary_loss, 0))   # NaN would be some

def test_gradient_checkpointing(smae, batch, bert_folder):
    """ With checkpointing loss and gradients are the same bits, with dropout too, and less is kept for backward. The
    flag reaches a loaded model, which is there to be trained. """
    for block in [*smae.bert.blocks, smae.decoder]:
        block.attention_dropout.p = block.dropout.p = 0.1
    def kept(function):
        """ -> bytes that backward needs, what function returns """
        sizes = []
        def note(tensor):
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            found = function()
        return sum(sizes), found
    runs = []
    for smae.bert.gradient_checkpointing in (False, True):
        torch.manual_seed(1)
        size, (loss, _) = kept(lambda: smae_loss(smae, *batch, SIZES))
        runs.append((size, [loss, *torch.autograd.grad(loss, learned(smae))]))
    assert all(map(torch.equal, runs[0][1], runs[1][1])) and runs[1][0] < runs[0][0] / 3
    loaded, *_ = build_model(parse_args(["--init_from", bert_folder, "--gradient_checkpointing", "--device", "cpu"]))
    assert loaded.bert.gradient_checkpointing and loaded.bert.training

# ---- whole runs ------------------------------------------------------------------------------------------------------
SMALL = ("--num_layers 2 --hidden_size 64 --vocab_size 150 --max_length 24 --batch_size 8 --max_steps 3 "
         "--log_interval 1 --device cpu --dtype float32 --no-compile").split()

@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """ 32 documents of 12 or 13 words, and an empty line """
    path = tmp_path_factory.mktemp("text") / "text.txt.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join(f"{line} number {i}" for i, line in enumerate(LINES * 8)) + "\n\n")
    return str(path)

def train(text_file, out, *flags):
    """ a whole run on 28 documents, a second or less -> its records in log.jsonl """
    main(parse_args(["--train_text", text_file, "--out_dir", str(out), *SMALL, *flags]))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

def state(out):
    """ the weights, decoder and head included """
    return torch.load(out / STATE)["model"]

def test_a_run_equals_a_plain_loop(text_file, tmp_path):
    """ Five steps of main, in two pieces each, give the weights, losses and norms of a plain PyTorch loop. """
    flags = ("--max_steps 5 --micro_batch 4 --sizes 1:8,2:64 --warmup 0.4 --embedding_lr_scale 4 --weight_decay 0.3 "
             "--encoder_mask 0.3 --decoder_mask 0.5 --dropout 0.25").split()
    train(text_file, tmp_path / "start", *flags, "--learning_rate", "1e-30")
    records = [r for r in train(text_file, tmp_path / "a", *flags, "--learning_rate", "0.004") if "loss" in r]
    bert, tokenizer = load_model(tmp_path / "start", hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.25)
    smae = SMAE(bert, MLMHead(bert.config)).train()
    smae.load_state_dict(state(tmp_path / "start"))
    table = data.tokenize_text(text_file, tokenizer)
    rows = np.random.default_rng(0).permutation(32)[4:]                     # a tenth is held out
    def loss_of(step):
        loss = 0
        for piece in (0, 1):                                                # of 4 documents; an epoch has 3 batches
            at = 8 * (step % 3) + 4 * piece
            chosen = rows[data.epoch_order(28, 1, step // 3)[at:at + 4]]
            documents = [np.array(table[int(row)]["ids"]) for row in chosen]
            masked = data.smae_batch(documents, 24, (0.3, 0.5), tokenizer, [1, step, piece])
            torch.manual_seed(hash((1, step, piece)))                       # of dropout
            loss += smae_loss(smae, pack(masked.texts), masked, ((1, 8), (2, 64)))[0] / 2
        return loss
    rates = [0.002, 0.004, 0.004, 0.003, 0.001]                             # two steps up, then a cosine to 0
    losses, norms = plain_training(smae, loss_of, rates, scale=4, decay=0.3)
    assert [r["loss"] for r in records] == pytest.approx(losses, rel=1e-4)
    assert [r["norm"] for r in records] == pytest.approx(norms, rel=1e-3)
    torch.testing.assert_close(state(tmp_path / "a"), dict(smae.state_dict()), rtol=0, atol=2e-5)

def test_validation_text_is_held_out(text_file, tmp_path, monkeypatch):
    """ Each validation sees the same four documents once, with the same masks; no batch of training has one of them,
    and a document is trained on once an epoch at most. """
    seen, inner = {"train": [], "validate": []}, pretrain_smae.batch_loss
    def spy(model, documents, tokenizer, sizes, args, seed):
        seen["train" if model.training else "validate"].append(({d.tobytes() for d in documents}, len(documents), seed))
        return inner(model, documents, tokenizer, sizes, args, seed)
    monkeypatch.setattr(pretrain_smae, "batch_loss", spy)
    records = train(text_file, tmp_path / "a", "--epochs", "2", "--max_steps", "0", "--eval_interval", "3")
    (held_out, n, seed), again = seen["validate"]
    assert len(held_out) == n == 4 and again == (held_out, n, seed)
    for epoch in (seen["train"][:3], seen["train"][3:]):
        trained = set.union(*(documents for documents, *_ in epoch))
        assert len(trained) == 24 and not trained & held_out
    assert [r["step"] for r in records if "val loss" in r] == [3, 6]

def test_validation_sees_every_held_out_document_once(monkeypatch):
    """ Of many held-out documents validation takes fifty at a time, with other masks each, and gives the mean. """
    calls, model = [], torch.nn.Linear(1, 1)
    def batch_loss(model, documents, tokenizer, sizes, args, seed):
        calls.append((documents, tuple(seed)))
        return None, {"loss": torch.tensor(7.0 * len(calls))}
    monkeypatch.setattr(pretrain_smae, "batch_loss", batch_loss)
    assert pretrain_smae.validate(model, list(range(120)), None, None, None) == {"val loss": 14.0} and model.training
    documents, seeds = zip(*calls)
    assert sum(documents, []) == list(range(120)) and len(set(seeds)) == 3

def test_streaming_trains_on_all_that_arrives(text_file, tmp_path, monkeypatch):
    """ A run with --streaming trains on the documents in their order, after those held out; a stream that is too short
    is refused. """
    monkeypatch.setattr(pretrain_smae, "HELD_OUT", 4)
    seen, inner = [], data.smae_batch
    monkeypatch.setattr(data, "smae_batch", lambda documents, *rest: seen.append(documents) or inner(documents, *rest))
    flags = ["--streaming", "--micro_batch", "4"]
    train(text_file, tmp_path / "a", *flags)
    _, tokenizer = load_model(tmp_path / "a")
    want = [row["ids"] for row in data.tokenize_text(text_file, tokenizer)]
    assert [document.tolist() for documents in seen for document in documents] == want[4:28] + want[:4]
    with pytest.raises(ValueError, match="ended after 3 steps; lower --max_steps"):
        train(text_file, tmp_path / "b", *flags, "--max_steps", "4")

def test_what_comes_after_pre_training(text_file, tmp_path):
    """ Pre-training goes on from the folder with its head and a copy of its first block as the decoder, fine-tuning
    with its weights and its words. """
    train(text_file, out := tmp_path / "smae")
    (bert, tokenizer), saved = load_model(out), state(out)
    nothing = ["--init_from", str(out), "--max_steps", "1", "--learning_rate", "1e-30"]
    train(text_file, tmp_path / "more", *nothing)
    want = {name: saved[name.replace("decoder", "bert.blocks.0")] for name in saved}
    torch.testing.assert_close(state(tmp_path / "more"), want, rtol=0, atol=1e-7)
    assert not torch.allclose(saved["decoder.up.weight"], want["decoder.up.weight"], atol=1e-5)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"query": line[:20], "positive": line} for line in LINES[:4]])
    flags = ["--train_pairs", pairs, *nothing, "--out_dir", str(tmp_path / "srl"), *SMALL[-5:]]
    finetune_srl.main(finetune_srl.parse_args(flags))
    tuned, its_tokenizer = load_model(tmp_path / "srl")
    torch.testing.assert_close(dict(tuned.state_dict()), dict(bert.state_dict()), rtol=0, atol=1e-7)
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab() and tuned.config.sizes == bert.config.sizes
    assert its_tokenizer.model_max_length == 256   # more than was pre-trained on

@pytest.mark.parametrize("objective, kinds", [("smae", {"mlm", "mae"}), ("mlm", {"mlm"})])
def test_which_sizes_a_run_trains_and_saves(text_file, tmp_path, objective, kinds):
    """ SMAE trains the paper's six sizes and saves them, with [CLS]; MLM the full size alone, and saves its own. """
    records = train(text_file, tmp_path / "a", "--max_steps", "1", "--objective", objective)
    six = (1, 3), (1, 5), (1, 11), (1, 21), (2, 43), (2, 64)
    trained = six if objective == "smae" else six[-1:]
    for prefix, record in zip(("", "val "), records, strict=True):
        terms = {name for name in record if name.startswith((prefix + "mlm", prefix + "mae"))}
        assert terms == {f"{prefix}{kind} {n}:{d}" for n, d in trained for kind in kinds}
    config = load_model(tmp_path / "a")[0].config
    assert (config.sizes, config.pooling) == (six, "cls" if objective == "smae" else "mean")

@pytest.mark.parametrize("flags, message", [
    (["--batch_size", "500"], "--batch_size 500: there are 28 documents to train on"),
    (["--micro_batch", "3"], "--batch_size 8: no multiple of 1 x --micro_batch 3"),
    (["--sizes", "9:8"], "--sizes 9:8: this model has 2 layers"),
    (["--init_from", "bert", "--max_length", "65"], "--max_length 65: this model has 64 positions")])
def test_refused(text_file, bert_folder, tmp_path, flags, message):
    """ What cannot be trained is refused before anything is written, and the reason is said. """
    with pytest.raises(ValueError, match=message):
        train(text_file, tmp_path / "a", *[bert_folder if flag == "bert" else flag for flag in flags])
    assert not (tmp_path / "a").exists()
