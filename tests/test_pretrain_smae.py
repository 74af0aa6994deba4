""" SMAE: the loss against a literal transcription, masking, what reaches what, checkpoints, text from anywhere. """
import dataclasses
import gzip
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import finetune_srl
import model
import pretrain_smae
from conftest import refused_process
from model import SIZES as NAMED, Bert, from_pretrained, load_head, load_tokenizer, named_sizes, pack
from pretrain_smae import SMAE, MLMHead, VocabularyLoss, decode, fast_decode, fast_vocabulary_loss, smae_loss

SIZES = ((1, 6), (2, 16), (4, 48))
ROOT = Path(__file__).parent.parent
LINES = ["the apple stands beside the bridge in the morning light",
         "a dragon sleeps in the deep forest behind the garden",
         "every engine of the island needs a hammer and a needle",
         "the kitchen has a lantern and an orange mirror"] * 8


@pytest.fixture
def text_file(tmp_path, monkeypatch):
    """ 32 documents, 10 words long, and an empty line """
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    path = tmp_path / "text.txt.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join(f"{line} number {i}" for i, line in enumerate(LINES)) + "\n\n")
    return str(path)


@pytest.fixture(scope="module")
def words():
    """ a tokenizer whose words have one to several pieces """
    return data.train_wordpiece(LINES, 60)


@pytest.fixture(scope="module")
def documents(words):
    """ 40 documents of 10 to 100 words """
    rng = np.random.default_rng(0)
    vocabulary = " ".join(LINES).split()
    texts = (" ".join(rng.choice(vocabulary, n)) for n in rng.integers(10, 100, size=40))
    return list(data.tokenize_documents(texts, words))


@pytest.fixture
def smae(config, words):
    """ a small SMAE, float64, with weights that are not near zero """
    config.vocab_size = len(words)
    torch.manual_seed(0)
    model = SMAE(Bert(config), MLMHead(config))
    torch.nn.init.normal_(model.head.bias)
    torch.nn.init.normal_(model.head.dense.bias)
    torch.nn.init.normal_(model.decoder.up.weight, std=0.2)   # the decoder is no copy any more
    return model.double().eval()


FAST = (fast_decode, fast_vocabulary_loss)   # what training uses


def loss_and_terms(model, batch, masked, sizes, objective="smae", functions=FAST):
    """
    smae_loss -> loss, (terms,) CE, (terms,) accuracy: MLM of every size, then MAE of every size. The tests know the
    form of what it returns from here alone.
    """
    loss, ce, accuracy = smae_loss(model, batch, masked, sizes, objective, *functions)
    return loss, *(torch.stack(list(values.values())) for values in (ce, accuracy))


@pytest.fixture
def batch(documents, words):
    masked = data.smae_batch(documents[:12], 24, (0.2, 0.4), words, [1, 0])
    return pack(masked.texts), masked


def literal_loss(model, batch, masked, sizes):
    """ the equations of the method as they stand: text by text, size by size, vocabulary heads at all positions """
    bert, head = model.bert, model.head
    def V(x):
        return x @ bert.word.weight.T + head.bias
    def transform(x, d):
        return head.norm(F.gelu(x @ head.dense.weight[:, :d].T + head.dense.bias))
    lengths = [len(text) for text in masked.texts]
    ends = np.cumsum(lengths)[:-1]
    encoder_ids, decoder_ids = np.split(masked.encoder_ids, ends), np.split(masked.decoder_ids, ends)
    def labels(masked_positions):
        flat = np.full(sum(lengths), -100)
        flat[masked_positions] = np.concatenate(masked.texts)[masked_positions]
        return torch.from_numpy(flat)
    terms = []
    for kind in ("mlm", "mae"):
        for n, d in sizes:
            logits = []
            for e, x in zip(encoder_ids, decoder_ids):
                h = bert(pack([e]), [n])[n]                                         # (T, C)
                if kind == "mlm":
                    logits.append(V(transform(h[:, :d], d)))
                else:
                    bottleneck = transform(h[0, :d], d)                             # (C,)
                    embeddings = bert.embed(pack([x]))
                    decoded = model.decoder(torch.cat([bottleneck[None], embeddings[1:]]), [(1, len(x))])
                    logits.append(V(transform(decoded, bert.config.hidden_size)))   # (T, V)
            target = labels(masked.encoder_positions if kind == "mlm" else masked.decoder_positions)
            terms.append(F.cross_entropy(torch.cat(logits), target, ignore_index=-100))
    return sum(terms) / len(terms), terms


@pytest.mark.parametrize("functions", [(), FAST], ids=["plain", "fast"])
def test_loss_is_the_equations(smae, batch, monkeypatch, functions):
    """ The loss, its terms and its gradients equal those of the equations as they stand, to 1e-10 in float64. """
    monkeypatch.setattr(VocabularyLoss, "ROWS", 7)   # rows are not a multiple of it
    want, terms = literal_loss(smae, *batch, SIZES)
    want.backward()
    grads = {name: p.grad for name, p in smae.named_parameters()}
    smae.zero_grad()
    loss, ce, _ = loss_and_terms(smae, pack(batch[1].texts, multiple=35), batch[1], SIZES, functions=functions)
    assert len(batch[0].input_ids) % 35   # so there are fillers, and they change nothing
    loss.backward()
    torch.testing.assert_close(loss, want, atol=1e-10, rtol=0)
    torch.testing.assert_close(ce, torch.stack(terms), atol=1e-10, rtol=0)
    for name, p in smae.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], atol=1e-10, rtol=0, msg=name)
        assert p.grad.abs().max() > 1e-6 or name == "bert.token_type.weight", name
    mlm, *_ = loss_and_terms(smae, *batch, SIZES, "mlm", functions)
    torch.testing.assert_close(mlm, sum(terms[:3]) / 3, atol=1e-10, rtol=0)


def test_vocabulary_loss(monkeypatch):
    """ Weighted CE, hits and gradients equal those of plain logits, also where exp is no float32. """
    monkeypatch.setattr(VocabularyLoss, "ROWS", 4)
    torch.manual_seed(0)
    x, w, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((10, 5), (7, 5), (7,)))
    labels, weights = torch.randint(7, (10,)), torch.rand(10, dtype=torch.float64)
    loss, ce, hit = VocabularyLoss.apply(x, w, b, labels, weights, True)
    (3 * loss).backward()
    mine = [t.grad for t in (x, w, b)]
    x.grad = w.grad = b.grad = None
    logits = x @ w.T + b
    want = F.cross_entropy(logits, labels, reduction="none")
    (3 * (want * weights).sum()).backward()
    torch.testing.assert_close(ce, want.detach(), atol=1e-12, rtol=0)
    assert torch.equal(hit, logits.argmax(1) == labels) and 0 < hit.sum() < 10
    for got, t in zip(mine, (x, w, b)):
        torch.testing.assert_close(got, t.grad, atol=1e-12, rtol=0)
    far = torch.zeros(1, 5), torch.zeros(7, 5), torch.tensor([500.0] + [0.0] * 6)   # exp(-500) is no float32
    assert VocabularyLoss.apply(*far, torch.tensor([1]), torch.ones(1), False)[0] == 500


def test_fast_decode_is_decode(smae, batch):
    """ fast_decode equals the plain decode, in value and gradients, to 1e-10 in float64. """
    texts = pack(batch[1].texts, multiple=35)   # with fillers
    positions = torch.from_numpy(batch[1].decoder_positions)
    torch.manual_seed(0)
    inputs = [torch.randn(len(texts.input_ids), 48, dtype=torch.float64, requires_grad=True),
              torch.randn(3, len(texts.starts), 48, dtype=torch.float64, requires_grad=True)]
    weight = torch.randn(3, len(positions), 48, dtype=torch.float64)
    learned, found = [*inputs, *smae.decoder.parameters()], []
    for function in (pretrain_smae.decode, fast_decode):
        decoded = function(smae.decoder, *inputs, texts, positions)
        found.append([decoded, *torch.autograd.grad((decoded * weight).sum(), learned)])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
        assert want.abs().max() > 1e-3


def test_fast_vocabulary_loss_is_vocabulary_loss(smae, monkeypatch):
    """ fast_vocabulary_loss equals the plain one, in value and gradients, to 1e-10 in float64. """
    monkeypatch.setattr(VocabularyLoss, "ROWS", 7)
    torch.manual_seed(0)
    rows, V = {"mlm 1:6": 5, "mlm 4:48": 5, "mae 1:6": 11}, len(smae.head.bias)
    hidden = {term: torch.randn(M, 48, dtype=torch.float64, requires_grad=True) for term, M in rows.items()}
    labels = {term: torch.randint(V, (M,)) for term, M in rows.items()}
    labels["mae 1:6"][:4] = (hidden["mae 1:6"][:4] @ smae.bert.word.weight.T + smae.head.bias).argmax(1)   # hits
    learned, found = [*hidden.values(), smae.bert.word.weight, smae.head.bias], []
    for function in (pretrain_smae.vocabulary_loss, fast_vocabulary_loss):
        loss, ce, accuracy = function(smae, hidden, labels)
        assert list(ce) == list(accuracy) == list(rows) and accuracy["mae 1:6"] >= 4 / 11
        found.append([loss, *ce.values(), *accuracy.values(), *torch.autograd.grad(loss, learned)])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_a_term_without_positions_counts_0(smae):
    """ Where texts are too short to hide a token, the term, its accuracy and its gradient are 0, not NaN. """
    hidden = {"mlm 1:6": torch.randn(0, 48).double(), "mae 1:6": torch.randn(3, 48).double().requires_grad_()}
    labels = {"mlm 1:6": torch.zeros(0, dtype=torch.long), "mae 1:6": torch.tensor([1, 2, 3])}
    loss, ce, accuracy = fast_vocabulary_loss(smae, hidden, labels)
    loss.backward()
    assert ce["mlm 1:6"] == accuracy["mlm 1:6"] == 0 and loss.item() == pytest.approx(ce["mae 1:6"].item() / 2)
    assert hidden["mae 1:6"].grad.isfinite().all() and smae.bert.word.weight.grad.isfinite().all()


def test_gradient_checkpointing(smae, batch):
    """ With checkpointing loss and gradients are the same bits, and of a block backward keeps the input alone. """
    for block in [*smae.bert.blocks, smae.decoder]:
        block.p = block.attention.p = 0.1
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
        smae.zero_grad()
        torch.manual_seed(1)
        size, (loss, *_) = kept(lambda: loss_and_terms(smae.train(), *batch, SIZES))
        loss.backward()
        runs.append((size, loss, [p.grad for p in smae.parameters()]))
    assert torch.equal(runs[0][1], runs[1][1]) and all(map(torch.equal, runs[0][2], runs[1][2]))
    (three, _), (four, taps) = (kept(lambda: smae.bert(batch[0], [n])) for n in (3, 4))
    assert four - three == taps[4].numel() * taps[4].element_size()
    assert runs[1][0] < runs[0][0] / 3   # the decoder's inside is not kept either


@pytest.mark.parametrize("functions", [(), FAST], ids=["plain", "fast"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast(smae, batch, dtype, training, functions):
    """ Under autocast the loss is that of float32 to the digits that the type has, in training and in validation. """
    smae.float().train(training)
    for module in smae.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    smae.bert.config.hidden_dropout_prob = 0.0
    exact, *_ = loss_and_terms(smae, *batch, SIZES, functions=functions)
    with torch.autocast("cpu", getattr(torch, dtype)):
        loss, *_ = loss_and_terms(smae, *batch, SIZES, functions=functions)
    loss.backward()
    assert 0 < abs(loss - exact) < 0.02 * exact
    assert all(p.grad.isfinite().all() for p in smae.parameters())


def test_decode_takes_bottlenecks_of_another_dtype(smae, batch):
    """ Autocast on a GPU keeps LayerNorm in float32 where validation has bfloat16 embeddings: decode mixes the two. """
    texts, masked = batch
    embeddings = torch.randn(len(texts.input_ids), smae.bert.config.hidden_size, dtype=torch.float64)
    vectors = torch.randn(2, len(texts.starts), smae.bert.config.hidden_size)                       # float32
    at = torch.from_numpy(masked.decoder_positions)
    found, want = (decode(smae.decoder, embeddings, bottlenecks, texts, at) for bottlenecks in (vectors, vectors.double()))
    assert torch.equal(found, want)


class TestMasks:
    def test_whole_words_nested_rates(self, documents, words):
        """ Masks hide whole words, no special tokens, a budget a text, and the encoder's is part of the decoder's. """
        masked = data.smae_batch(documents, 80, (0.2, 0.4), words, [1, 5])
        flat, start, wide = np.concatenate(masked.texts), 0, 0
        pieces = words.convert_ids_to_tokens(range(len(words)))
        encoder, decoder = (np.isin(np.arange(len(flat)), at) for at in (masked.encoder_positions, masked.decoder_positions))
        assert (decoder | ~encoder).all()
        assert not np.isin(flat[decoder], words.all_special_ids).any()
        for text in masked.texts:
            assert text[0] == words.cls_token_id and text[-1] == words.sep_token_id
            for mask, rate in ((encoder, 0.2), (decoder, 0.4)):
                mask = mask[start:start + len(text)]
                runs, longest = [], 0                                   # the tokens of each word
                for i in range(1, len(text) - 1):
                    if i == 1 or not pieces[text[i]].startswith("##"):
                        runs.append([])
                    runs[-1].append(i)
                assert all(len({bool(mask[i]) for i in run}) == 1 for run in runs)
                longest = max(map(len, runs))
                assert abs(mask.sum() - round(rate * (len(text) - 2))) <= longest / 2 + 0.5
                wide += longest > 1
            start += len(text)
        assert wide > 40   # the claim about whole words was put to the test
        assert encoder.sum() / (len(flat) - 80) == pytest.approx(0.2, abs=0.01)
        assert decoder.sum() / (len(flat) - 80) == pytest.approx(0.4, abs=0.01)

    def test_80_10_10(self, words):
        """ Of the masked tokens 80 % show [MASK], 10 % a random token, 10 % the true one; no other token changes. """
        rng = np.random.default_rng(0)
        ids = rng.integers(5, len(words), size=40_000)
        hidden = rng.random(len(ids)) < 0.5
        shown = data.corrupt(ids, hidden, words.mask_token_id, len(words), rng)
        assert (shown[~hidden] == ids[~hidden]).all()
        mask, same = shown == words.mask_token_id, shown == ids
        assert mask[hidden].mean() == pytest.approx(0.8, abs=0.01)
        assert same[hidden].mean() == pytest.approx(0.1 + 0.1 / len(words), abs=0.01)
        assert len(set(shown[hidden & ~mask & ~same])) > 0.9 * len(words)   # random: from all of the vocabulary

    def test_pieces_have_masks_of_their_own(self, words):
        """ Each part of [seed, step, piece] decides the masks, so equal documents in two pieces are masked anew. """
        document = [np.full(60, np.flatnonzero(data.word_begins(words))[-1], np.uint16)]
        seeds = [1, 2, 3], [4, 2, 3], [1, 4, 3], [1, 2, 4]
        found = {tuple(data.smae_batch(document, 62, (0.2, 0.4), words, seed).decoder_positions) for seed in seeds}
        assert len(found) == 4

    def test_every_word_is_as_likely(self):
        """ Long words are masked as often as short ones, to a few percent. """
        begins = np.array([True] + [True, True, False, True, False, False] * 20 + [True])
        rates = np.zeros(122)
        for seed in range(400):
            mask, = data.whole_word_mask(begins, [0.3], np.random.default_rng(seed))
            rates += mask / 400
        by_length = [rates[1:-1].reshape(20, 6)[:, i].mean() for i in (0, 1, 3)]
        assert np.allclose(by_length, 0.3, atol=0.02) and rates[0] == rates[-1] == 0

    def test_pure_function(self, documents, words):
        """ The same seed gives the same windows and masks, another step others, and windows start anywhere. """
        def make(step):
            return data.smae_batch(documents, 16, (0.2, 0.4), words, [7, step])
        a, b, c = make(1), make(1), make(2)
        assert all(np.array_equal(x, y) for x, y in zip(a[1:], b[1:])) and len(a.encoder_ids) == len(c.encoder_ids)
        assert not np.array_equal(a.encoder_positions, c.encoder_positions)
        sixty = [np.arange(1, 61, dtype=np.uint16)]
        windows = (data.smae_batch(sixty, 12, (0.2, 0.4), words, [7, step]).texts[0] for step in range(2000))
        starts = {int(window[1]) for window in windows}
        assert starts == set(range(1, 52))   # the first and the last window of ten included

    def test_window_inside_a_word(self, words):
        """ What is left of a word at the start of a window is masked as often as a word. """
        begins = data.word_begins(words)
        (first, second), word = np.flatnonzero(~begins)[:2], np.flatnonzero(begins)[-1]
        document = np.array([first, second] + [word] * 18, np.uint16)   # the window is all of it: no word begins at 0
        at = [1 in data.smae_batch([document], 22, (0.2, 0.4), words, [seed]).decoder_positions for seed in range(500)]
        assert np.mean(at) == pytest.approx(0.4, abs=0.08)


class TestWhatReachesWhat:
    def test_gradient_from_a_size(self, smae, batch):
        """ A size (n, d) trains the blocks up to n and none above. """
        for n, d in SIZES:
            smae.zero_grad()
            loss_and_terms(smae, *batch, [(n, d)])[0].backward()
            grads = [block.down.weight.grad for block in smae.bert.blocks]
            reached = [grad is not None and bool(grad.any()) for grad in grads]
            assert reached == [i < n for i in range(4)]

    def test_head_columns_beyond_d(self, smae, batch):
        """ The MLM of a size d leaves the dense weight's columns beyond d alone. """
        loss_and_terms(smae, *batch, [(2, 16)], "mlm")[0].backward()
        grad = smae.head.dense.weight.grad
        assert grad[:, :16].abs().min() > 0 and not grad[:, 16:].any()

    def test_tap_coordinates_beyond_d(self, smae, batch, monkeypatch):
        """ Neither MLM nor bottleneck looks at coordinates beyond d of a tap. """
        taps = {n: tap.detach().requires_grad_() for n, tap in smae.bert(batch[0], [n for n, _ in SIZES]).items()}
        monkeypatch.setattr(smae.bert, "forward", lambda *_: taps)
        loss_and_terms(smae, *batch, SIZES)[0].backward()
        for tap, (_, d) in zip(taps.values(), SIZES, strict=True):
            assert tap.grad[batch[0].starts, :d].abs().min() > 0 and not tap.grad[:, d:].any()

    def test_decoder_sees_position_0_alone(self, smae, batch, monkeypatch):
        """ Other taps at position 0 change MAE and leave MLM as it is; at all other positions it is the reverse. """
        taps = smae.bert(batch[0]._replace(input_ids=torch.from_numpy(batch[1].encoder_ids)), [n for n, _ in SIZES])
        _, before, _ = loss_and_terms(smae, *batch, SIZES)
        def losses(where):
            other = {n: tap.index_put((where,), torch.randn(len(where), tap.shape[1], dtype=tap.dtype))
                     for n, tap in taps.items()}
            with monkeypatch.context() as patch:
                patch.setattr(smae.bert, "forward", lambda *_: other)
                return loss_and_terms(smae, *batch, SIZES)[1]
        first = batch[0].starts
        rest = torch.tensor(sorted(set(range(len(batch[0].input_ids))) - set(first.tolist())))
        after = losses(rest)
        assert torch.equal(after[3:], before[3:]) and (after[:3] != before[:3]).all()
        after = losses(first)
        assert torch.equal(after[:3], before[:3]) and (after[3:] != before[3:]).all()


def test_overfit(smae, batch):
    """ Head, decoder and encoder together learn one batch by heart. """
    smae.float().train()
    optimizer = torch.optim.Adam(smae.parameters(), lr=3e-3)
    for _ in range(150):
        loss, ce, accuracy = loss_and_terms(smae, *batch, SIZES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 and accuracy[-1] > 0.98 and ce[0] < 0.5   # even 6 dims of layer 1


# ----------------------------------------------------------------------------------------------------------------------


SMALL = ("--num_layers 2 --hidden_size 64 --vocab_size 150 --max_length 24 --batch_size 8 --max_steps 8 "
         "--log_interval 1 --device cpu --dtype float32 --no-compile --dropout 0.1").split()


def train(text_file, out, *flags):
    """ a whole run on 28 documents, a second or less """
    pretrain_smae.main(pretrain_smae.parse_args(["--train_text", text_file, "--out_dir", str(out), *SMALL, *flags]))


def logged(out, kind="loss"):
    """ the records of log.jsonl that have this key """
    records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [record for record in records if kind in record]


def losses(out):
    """ (step, loss of training, loss of validation) of every line of the log """
    return [(r["step"], r.get("loss"), r.get("val_loss")) for r in logged(out, "step")]


def state(out):
    """ the weights, decoder and head included """
    return torch.load(Path(out) / "training_state.pt")["model"]


def plain_loop(start, text_file, lrs, embedding_scale, weight_decay, clip, p):
    """ what a run of main has to do, in plain PyTorch, from the weights of `start` -> SMAE, losses, norms """
    tokenizer, bert = load_tokenizer(start), from_pretrained(start, hidden_dropout_prob=p,
                                                                  attention_probs_dropout_prob=p)
    smae = SMAE(bert, load_head(start, bert.config)).train()
    smae.load_state_dict(state(start))
    text = data.token_file(text_file, tokenizer)
    train = np.random.default_rng(0).permutation(len(text))[4:]            # a tenth of 32 documents is held out
    optimizer = torch.optim.AdamW([{"params": [q], "weight_decay": weight_decay if q.dim() > 1 else 0.0,
                                    "scale": embedding_scale if name == "bert.word.weight" else 1.0}
                                   for name, q in smae.named_parameters()])
    losses, norms = [], []
    for step, lr in enumerate(lrs):
        smae.zero_grad()
        losses.append(0)
        for piece in (0, 1):                                               # of 4 documents; an epoch has 3 batches
            at = 8 * (step % 3) + 4 * piece
            rows = train[data.epoch_order(len(train), 1, step // 3)[at:at + 4]]
            masked = data.smae_batch([text[i] for i in rows], 24, (0.3, 0.5), tokenizer, [1, step, piece])
            torch.manual_seed(hash((1, step, piece)))                      # of dropout
            loss = loss_and_terms(smae, pack(masked.texts), masked, ((1, 8), (2, 64)))[0] / 2
            loss.backward()
            losses[-1] += loss.item()
        norm = torch.stack([q.grad.norm() for q in smae.parameters()]).norm()
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
            for q in group["params"]:
                q.grad *= min(1, clip / norm)
        optimizer.step()
        norms.append(norm.item())
    return smae, losses, norms


def test_a_run_equals_a_plain_loop(text_file, tmp_path):
    """ Four steps of main give the weights, losses and norms of a plain loop, with every option on. """
    flags = ["--max_steps", "4", "--micro_batch", "4", "--sizes", "1:8,2:64", "--dropout", "0.25", "--warmup", "0.5",
             "--word_lr_scale", "4", "--weight_decay", "0.3", "--grad_clip", "2", "--encoder_mask", "0.3",
             "--decoder_mask", "0.5"]
    train(text_file, tmp_path / "start", *flags, "--learning_rate", "1e-30")
    train(text_file, tmp_path / "run", *flags, "--learning_rate", "0.004")
    lrs = [0.002, 0.004, 0.004, 0.002]                                     # two steps up, then a cosine to 0 over two
    smae, losses, norms = plain_loop(tmp_path / "start", text_file, lrs, 4.0, 0.3, 2.0, 0.25)
    assert min(norms) < 2 < max(norms)                                     # clipping bites in some steps
    assert [r["loss"] for r in logged(tmp_path / "run")] == pytest.approx(losses, rel=1e-4)
    assert [r["norm"] for r in logged(tmp_path / "run")] == pytest.approx(norms, rel=1e-3)
    found = state(tmp_path / "run")
    for name, want in smae.state_dict().items():
        got = found[name]
        if name.endswith("qkv.bias"):   # softmax ignores the bias of the keys: its gradient is rounding error
            got, want = (torch.cat([bias[:64], bias[128:]]) for bias in (got, want))
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5, msg=name)


def test_figures_of_the_log_are_those_of_a_step(text_file, tmp_path, monkeypatch):
    """ With two steps a line of the log, each in two pieces, ms is the time of a step, and tokens are those of all. """
    tokens, make = [], data.smae_batch
    monkeypatch.setattr(data, "smae_batch", lambda *args: tokens.append(sum(map(len, (m := make(*args)).texts))) or m)
    monkeypatch.setattr(pretrain_smae, "time", SimpleNamespace(time=itertools.count().__next__))   # a second a call
    train(text_file, tmp_path / "out", "--micro_batch", "4", "--max_steps", "4", "--log_interval", "2")
    found = logged(tmp_path / "out")
    assert [r["ms"] for r in found] == [500, 500]
    assert [r["tokens_per_second"] for r in found] == [sum(tokens[:4]), sum(tokens[4:8])]


def test_validation_is_no_time_of_a_step(text_file, tmp_path, monkeypatch):
    """ The ms of a step in the log are the same with a validation, which takes as long as 100 steps, in between. """
    now, make = [0.0], data.smae_batch
    def passes(seconds, result):
        now[0] += seconds
        return result
    monkeypatch.setattr(pretrain_smae, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(data, "smae_batch", lambda *args: passes(1, make(*args)))
    monkeypatch.setattr(pretrain_smae, "validate", lambda *args: passes(100, (1.0, {"mlm": 1.0}, {"mlm": 1.0})))
    train(text_file, tmp_path / "out", "--max_steps", "4", "--log_interval", "2", "--eval_interval", "2")
    assert [r["ms"] for r in logged(tmp_path / "out")] == [1000, 1000]
    assert [r["step"] for r in logged(tmp_path / "out", "val_loss")] == [2, 4]


def test_dropout_of_the_bottlenecks_share(smae, batch):
    """ At p = 0.5 dropout hides the bottleneck from half of the heads and positions and doubles its other shares. """
    decoder, (pack_of_texts, masked) = smae.decoder, batch
    C, H = 48, decoder.attention.heads
    with torch.no_grad():   # values are coordinate 0, which the bottleneck alone has: what a head mixes is its share
        decoder.attention.qkv.weight[:2 * C, 0] = 0
        decoder.attention.qkv.weight[2 * C:] = 0
        decoder.attention.qkv.weight[2 * C:, 0] = 1
        decoder.attention.out.weight.copy_(torch.eye(C))
    decoder.after_attention = lambda x, mixed: mixed
    torch.manual_seed(0)
    embeddings = torch.randn(len(pack_of_texts.input_ids), C, dtype=torch.float64)
    bottleneck = torch.randn(3, len(pack_of_texts.starts), C, dtype=torch.float64)
    embeddings[:, 0], bottleneck[..., 0] = 0, 1
    at, decoder.attention.p = torch.from_numpy(masked.decoder_positions), 0.5
    share, heard = (fast_decode(decoder.train(training), embeddings, bottleneck, pack_of_texts, at)
                    .unflatten(2, (H, C // H))[..., 0] for training in (False, True))   # (S, M, H)
    assert (share > 0).all() and 0.4 < (heard == 0).double().mean() < 0.6
    torch.testing.assert_close(heard[heard != 0], 2 * share[heard != 0], rtol=0, atol=1e-12)


def test_dropout_among_the_decoders_other_positions(smae, batch):
    """ At p = 0.5 dropout hides other positions one by one and doubles the rest, so their mean share stays. """
    decoder, (pack_of_texts, masked) = smae.decoder, batch
    C, H = 48, decoder.attention.heads
    with torch.no_grad():   # values are coordinate 0, which all but the bottleneck have: a head mixes their share
        decoder.attention.qkv.weight[:2 * C, 0] = 0
        decoder.attention.qkv.weight[2 * C:] = 0
        decoder.attention.qkv.weight[2 * C:, 0] = 1
        decoder.attention.out.weight.copy_(torch.eye(C))
    decoder.after_attention = lambda x, mixed: mixed
    torch.manual_seed(0)
    embeddings = torch.randn(len(pack_of_texts.input_ids), C, dtype=torch.float64)
    bottleneck = torch.randn(3, len(pack_of_texts.starts), C, dtype=torch.float64)
    embeddings[:, 0], bottleneck[..., 0] = 1, 0
    at, decoder.attention.p = torch.from_numpy(masked.decoder_positions), 0.5
    share, heard = (fast_decode(decoder.train(training), embeddings, bottleneck, pack_of_texts, at)
                    .unflatten(2, (H, C // H))[..., 0] for training in (False, True))   # (S, M, H)
    assert ((heard - share).abs() > 1e-3 * share).double().mean() > 0.95
    assert heard.mean().item() == pytest.approx(share.mean().item(), rel=0.1)


def test_validation_sees_every_held_out_document_once(monkeypatch):
    """ The validation loss takes all held-out documents, fifty at a time, each fifty with masks of its own. """
    seen, seeds = [], []
    def batch_loss(model, documents, tokenizer, sizes, args, seed):
        seen.extend(documents), seeds.append(tuple(seed))
        return (torch.tensor(7.0 * len(seeds)), {"mlm": torch.tensor(float(len(seeds)))}, {"mlm": torch.tensor(0.5)}), 0
    monkeypatch.setattr(pretrain_smae, "batch_loss", batch_loss)
    model = torch.nn.Linear(1, 1)
    assert pretrain_smae.validate(model, list(range(120)), None, None, None) == (14.0, {"mlm": 2.0}, {"mlm": 0.5})
    assert seen == list(range(120)) and len(set(seeds)) == 3 and model.training


def test_flags_that_decide_the_result_must_not_change(tmp_path):
    """ --resume refuses another value of every flag, but of those that say where, how often to log and on what. """
    args = pretrain_smae.parse_args(["--out_dir", str(tmp_path)])
    free = {"out_dir", "overwrite", "resume", "log_interval", "save_interval", "eval_interval", "device", "compile"}
    for name in vars(args):
        parts = dict.fromkeys(("about", "step", "model", "optimizer"))
        torch.save(parts | {"args": vars(args) | {name: "another"}}, tmp_path / "training_state.pt")
        if name in free:
            model.load_run(args)
        else:
            with pytest.raises(ValueError, match=f"--resume: --{name} is .*had another"):
                model.load_run(args)


@pytest.mark.parametrize("streaming", [False, True])
def test_resume(text_file, tmp_path, monkeypatch, streaming):
    """ A run that stopped after 4 of 8 steps and is resumed has batches, losses and weights of a whole run. """
    if streaming:
        import datasets
        text_file = str(tmp_path / "text.parquet")
        datasets.Dataset.from_dict({"text": [f"{line} {i}" for i, line in enumerate(LINES * 20)]}).to_parquet(text_file)
    flags = ["--eval_interval", "4", "--save_interval", "4"] + ["--streaming"] * streaming
    batches, make = {}, data.smae_batch   # {[seed, step, piece]: the masked texts of every run}
    def smae_batch(*args):
        masked = make(*args)
        held = b"".join(part.tobytes() for part in [*masked.texts, *masked[1:]])
        batches.setdefault(tuple(args[-1]), []).append(held)
        return masked
    monkeypatch.setattr(data, "smae_batch", smae_batch)
    train(text_file, tmp_path / "whole", *flags)
    class Stopped(Exception):
        pass
    def replace(source, target):
        os.rename(source, target)
        if "training_state" in str(target):
            raise Stopped
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(data.os, "replace", replace)
        train(text_file, tmp_path / "halves", *flags)
    with open(tmp_path / "halves" / "log.jsonl", "a") as log:
        log.write('{"step": 5, "loss": 1.0}\n')   # as if the run had been killed after a fifth step
    train(text_file, tmp_path / "halves", *flags, "--resume")
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 10
    assert [(len(batches[1, step, 0]), len(set(batches[1, step, 0]))) for step in range(8)] == [(2, 1)] * 8
    a, b = state(tmp_path / "halves"), state(tmp_path / "whole")
    assert all(torch.equal(a[name], b[name]) for name in b)
    with pytest.raises(ValueError, match="--resume: --learning_rate is 0.5, and the run in .* had 0.001"):
        train(text_file, tmp_path / "halves", *flags, "--resume", "--learning_rate", "0.5")


def test_gradient_checkpointing_flag(text_file, tmp_path, monkeypatch):
    """ A run with --gradient_checkpointing ends with the same bits, and computes 2 blocks and the decoder again. """
    train(text_file, tmp_path / "plain", "--max_steps", "3")
    again, inner = [], model.checkpoint
    monkeypatch.setattr(model, "checkpoint", lambda *args, **kwargs: again.append(args[0]) or inner(*args, **kwargs))
    train(text_file, tmp_path / "again", "--max_steps", "3", "--gradient_checkpointing")
    assert len(again) == 3 * 3   # 3 steps; the validation has no backward pass
    a, b = state(tmp_path / "plain"), state(tmp_path / "again")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_checkpoint(text_file, tmp_path, monkeypatch):
    """ transformers' BertForMaskedLM takes the folder with strict keys and gives our logits; SRL starts from it. """
    from transformers import AutoTokenizer, BertForMaskedLM
    out = tmp_path / "smae"
    train(text_file, out, "--max_steps", "3")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    theirs, info = BertForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    bert, head, tokenizer = from_pretrained(out), None, AutoTokenizer.from_pretrained(out)
    head = load_head(out, bert.config)
    ids = tokenizer("the apple stands beside the [MASK] in the morning", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = bert(pack([ids[0].numpy()]), [2])[2]
        logits = head.transform(hidden) @ bert.word.weight.T + head.bias
        torch.testing.assert_close(logits, theirs.eval()(ids).logits[0], atol=1e-5, rtol=0)
    assert torch.equal(head.dense.weight, state(out)["head.dense.weight"])
    # on with pre-training: head and decoder are the ones that were saved, and no parameter learns faster than others
    with monkeypatch.context() as patch:
        scales, configure = [], pretrain_smae.configure_optimizer
        patch.setattr(pretrain_smae, "configure_optimizer", lambda *args: scales.append(args[-1]) or configure(*args))
        train(text_file, tmp_path / "more", "--init_from", str(out), "--max_steps", "1", "--learning_rate", "1e-30")
    assert scales == [1.0]
    a, b = state(out), state(tmp_path / "more")
    assert all(torch.allclose(a[name], b[name], atol=1e-7) for name in b)
    assert not torch.equal(b["decoder.up.weight"], b["bert.blocks.0.up.weight"])
    # and with fine-tuning
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"query": line[:20], "positive": line}) + "\n" for line in LINES[:4]))
    finetune_srl.main(finetune_srl.parse_args([
        "--init_from", str(out), "--train_pairs", str(pairs), "--retrieval", "", "--max_steps", "1",
        "--passage_max_length", "24", "--query_max_length", "24", "--out_dir", str(tmp_path / "srl"),
        "--learning_rate", "1e-30", "--dtype", "float32", "--device", "cpu", "--no-compile"]))
    tuned = from_pretrained(tmp_path / "srl")
    assert load_tokenizer(tmp_path / "srl").model_max_length == 256   # more than was pre-trained on
    assert torch.allclose(tuned.word.weight, bert.word.weight, atol=1e-7)
    assert load_tokenizer(tmp_path / "srl").get_vocab() == tokenizer.get_vocab()


def test_smae_after_mlm_has_a_copy_of_the_trained_block(text_file, tmp_path):
    """ Plain MLM trains no decoder, so the decoder of SMAE that goes on from it starts as the trained first block. """
    train(text_file, tmp_path / "mlm", "--max_steps", "3", "--objective", "mlm")
    train(text_file, tmp_path / "smae", "--init_from", str(tmp_path / "mlm"), "--max_steps", "1",
          "--learning_rate", "1e-30")
    mlm, smae = state(tmp_path / "mlm"), state(tmp_path / "smae")
    assert torch.allclose(smae["decoder.up.weight"], mlm["bert.blocks.0.up.weight"], atol=1e-7)
    assert not torch.allclose(mlm["decoder.up.weight"], mlm["bert.blocks.0.up.weight"], atol=1e-5)   # the stale one


@pytest.mark.parametrize("objective, names", [("smae", [name for name, *_ in NAMED]), ("mlm", [])])
def test_which_sizes_a_run_saves(text_file, tmp_path, objective, names):
    """ A run of SMAE saves the paper's six sizes with their names, and that it trained [CLS]; a run of MLM neither, and
    its loss has no term of the decoder. """
    train(text_file, tmp_path / "out", "--max_steps", "1", "--objective", objective)
    for kind in ("ce", "val_ce"):
        terms = {name.split()[0] for name in logged(tmp_path / "out", kind)[0][kind]}
        assert terms == ({"mlm", "mae"} if objective == "smae" else {"mlm"})
    config = from_pretrained(tmp_path / "out").config
    assert list(config.size_names) == names and len(config.sizes) == len(names)
    assert config.pooling == ("cls" if objective == "smae" else "mean")
    assert list(named_sizes(config).items()) == [((1, 3), "Demi"), ((1, 5), "Short"), ((1, 11), "Tall"),
                                                 ((1, 21), "Grande"), ((2, 43), "Venti"), ((2, 64), "Trenta")]


def test_bias_starts_at_the_frequencies(text_file, tmp_path):
    """ From scratch the head's bias is the log frequency of each word, one more counted for every word. """
    train(text_file, tmp_path / "out", "--max_steps", "1", "--learning_rate", "1e-30")
    tokenizer = load_tokenizer(tmp_path / "out")
    text = data.token_file(text_file, tokenizer)
    counts = np.bincount(np.concatenate([text[i] & 0x7fff for i in range(len(text))]), minlength=len(tokenizer)) + 1
    assert np.allclose(state(tmp_path / "out")["head.bias"], np.log(counts / counts.sum()), atol=1e-6)


def test_init_without_head(tmp_path, model, tokenizer):
    """ A checkpoint without an MLM head gets a new one; the decoder starts as a copy of encoder layer 1. """
    from model import save_pretrained
    save_pretrained(model, tokenizer, tmp_path)
    head = load_head(tmp_path, model.config)
    assert head.dense.weight.std().item() == pytest.approx(0.2, rel=0.1) and not head.bias.any()
    decoder = SMAE(model, head).decoder
    assert all(torch.equal(a, b) and a is not b for a, b in zip(decoder.parameters(), model.blocks[0].parameters()))


def test_dropout_of_a_loaded_model_is_the_flags(text_file, tmp_path, bert_folder):
    """ A loaded model trains with --dropout, not with the rates of its own config. """
    train(text_file, tmp_path / "out", "--init_from", bert_folder, "--dropout", "0.25", "--max_steps", "1")
    config = from_pretrained(tmp_path / "out").config
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.25


def test_models_that_cannot_be_masked(text_file, tmp_path, bert_folder, tokenizer, refused):
    """ A head that does not fit its BERT and a tokenizer without [CLS], [SEP] or [MASK] are refused in one line. """
    from model import save_pretrained
    flags = ["--train_text", text_file, "--max_length", "16", "--init_from", str(tmp_path / "m"), "--out_dir"]
    bert = from_pretrained(bert_folder)
    save_pretrained(bert, tokenizer, tmp_path / "m", MLMHead(dataclasses.replace(bert.config, hidden_size=5)))
    assert "its MLM head does not fit its BERT" in refused(pretrain_smae, [*flags, str(tmp_path / "out")])
    save_pretrained(bert, tokenizer, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    for token in ("cls_token", "sep_token", "mask_token"):
        (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(config | {token: None}))
        assert "its tokenizer has no [CLS], [SEP] or [MASK]" in refused(pretrain_smae, [*flags, str(tmp_path / "out")])


def test_ranks_and_micro_batches(text_file, tmp_path):
    """ Two ranks (gloo) with half a batch each train the weights of one process with the batch in two pieces, and log
    as many tokens a step. """
    train(text_file, tmp_path / "one", "--micro_batch", "4")
    script = tmp_path / "two.py"
    script.write_text(f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
                      f"import pathlib, data, test_pretrain_smae\ndata.CACHE = pathlib.Path({str(data.CACHE)!r})\n"
                      f"test_pretrain_smae.train({text_file!r}, {str(tmp_path / 'two')!r})\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    a, b = state(tmp_path / "one"), state(tmp_path / "two")
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in b)
    one, two = ([r["loss"] for r in logged(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-4)
    one, two = ([r["tokens_per_second"] * r["ms"] / 1000 for r in logged(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=0.2)   # the first rank takes its own half twice


# ----------------------------------------------------------------------------------------------------------------------


class TestText:
    def test_every_source(self, tmp_path, text_file):
        """ Every kind of file, and a local copy of a hub set, whole or streamed, gives the same documents. """
        import datasets
        want = [f"{line} number {i}" for i, line in enumerate(LINES)]
        table = datasets.Dataset.from_dict({"text": want, "id": list(range(len(want)))})
        (tmp_path / "hub").mkdir()
        table.to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
        table.to_parquet(tmp_path / "text.parquet")
        table.to_json(tmp_path / "text.jsonl")
        sources = [text_file, str(tmp_path / "text.jsonl"), str(tmp_path / "text.parquet"), str(tmp_path / "hub")]
        for source in sources:
            assert [text.strip() for text in data.load_texts(source) if text.strip()] == want
        for source in sources[2:]:
            assert list(data.load_texts(source, streaming=True)) == want

    def test_ranks_stream_their_own(self, tmp_path):
        """ Two ranks read different files of a streamed set, and together all of it. """
        import datasets
        for i in range(2):
            texts = {"text": [f"{i}{k}" for k in range(5)]}
            datasets.Dataset.from_dict(texts).to_parquet(tmp_path / f"train-0000{i}-of-00002.parquet")
        first, second = (list(data.load_texts(str(tmp_path), True, rank, 2)) for rank in (0, 1))
        assert {text[0] for text in first} == {"0"} and {text[0] for text in second} == {"1"}
        assert len(first + second) == 10

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_stream_loses_no_document(self, tmp_path, words, monkeypatch, world_size):
        """ The steps of each rank, resumed or not, hold the documents of its stream after the held-out, in order. """
        import datasets
        nouns = " ".join(LINES[:4]).split()
        texts = list(dict.fromkeys(f"{a} {b}" for a in nouns for b in nouns))[:120]   # known words, no two texts alike
        for i in range(2):
            table = datasets.Dataset.from_dict({"text": texts[60 * i:60 * (i + 1)]})
            table.to_parquet(tmp_path / f"train-0000{i}-of-00002.parquet")
        monkeypatch.setattr(pretrain_smae, "HELD_OUT", 7)
        flags = ["--streaming", "--max_steps", "5", "--batch_size", "8", "--micro_batch", "2"]
        args = pretrain_smae.parse_args(["--train_text", str(tmp_path), "--out_dir", str(tmp_path / "out"), *flags])
        for rank in range(world_size):
            texts = data.load_texts(str(tmp_path), True, rank, world_size)
            stream = [document.tolist() for document in data.tokenize_documents(texts, words)]
            assert len(set(map(tuple, stream))) == len(stream) == 120 // world_size
            for first_step in (0, 3):
                mine = range(rank, 4, world_size)
                held_out, max_steps, steps = pretrain_smae.stream_text(args, words, 2, first_step, mine, rank, world_size)
                pieces = [piece for step in steps for piece in step]
                assert [number for number, _ in pieces[:4 // world_size]] == list(mine)
                found = [document.tolist() for _, documents in pieces for document in documents]
                share = 8 // world_size   # documents of a step
                assert [document.tolist() for document in held_out] == stream[:7]
                assert found == stream[7 + share * first_step:7 + share * 5]

    def test_stream_ends(self, tmp_path):
        """ A stream that is too short for --max_steps says so. """
        import datasets
        datasets.Dataset.from_dict({"text": LINES * 20}).to_parquet(tmp_path / "text.parquet")
        with pytest.raises(ValueError, match="ended at step 17; choose fewer --max_steps"):
            train(str(tmp_path / "text.parquet"), tmp_path / "out", "--streaming", "--max_steps", "30")

    def test_a_stream_that_ends_within_a_batch(self, tmp_path, words, monkeypatch):
        """ A step whose last piece is not full is refused, although its first piece is. """
        import datasets
        datasets.Dataset.from_dict({"text": LINES[:2 + 8 + 5]}).to_parquet(tmp_path / "text.parquet")
        monkeypatch.setattr(pretrain_smae, "HELD_OUT", 2)
        args = SimpleNamespace(train_text=str(tmp_path / "text.parquet"), columns=[], batch_size=8, max_steps=3)
        _, _, steps = pretrain_smae.stream_text(args, words, 4, 0, range(2), 0, 1)
        assert [len(documents) for _, documents in next(steps)] == [4, 4]
        with pytest.raises(ValueError, match="ended at step 1; choose fewer --max_steps"):
            next(steps)

    @pytest.mark.parametrize("epochs, want", [(0.01, 1), (0.34, 3), (1.5, 14), (2, 18)])
    def test_broken_epochs(self, epochs, want):
        """ Of 9 steps an epoch, --epochs takes its share to the nearest step, and at least one. """
        class Text(list):
            ends = np.arange(1, 41) * 8
        args = SimpleNamespace(max_length=24, encoder_mask=0.2, batch_size=4, max_steps=0, epochs=epochs, seed=1)
        held_out, max_steps, steps = pretrain_smae.shuffle_text(args, Text(range(40)), 4, 0, [0])
        assert (len(held_out), max_steps, len(list(steps))) == (4, want, want)

    def test_token_file(self, text_file, words):
        """ The file holds the tokenizer's ids, 16 bits each, and is made once a text. """
        found = data.token_file(text_file, words)
        assert len(found) == len(LINES) and isinstance(found.tokens, np.memmap)
        for i, line in enumerate(LINES):
            ids = words(f"{line} number {i}", add_special_tokens=False)["input_ids"]
            assert found[i].tolist() == ids and found[i].dtype == np.uint16
        before = os.stat(text_file)
        os.utime(text_file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))   # as long, and of another date
        assert data.token_file(text_file, words).tokens.filename != found.tokens.filename
        os.utime(text_file, ns=(before.st_atime_ns, before.st_mtime_ns))
        stamp = os.stat(found.tokens.filename).st_mtime_ns
        assert os.stat(data.token_file(text_file, words).tokens.filename).st_mtime_ns == stamp
        with gzip.open(text_file, "at") as file:
            file.write("one more line\n")
        assert len(data.token_file(text_file, words)) == len(LINES) + 1   # a file that has changed is read again

    def test_two_runs_at_once(self, text_file, words, monkeypatch):
        """ The file that a second run finishes while the first still tokenises serves both, and nothing else stays. """
        monkeypatch.setattr(os, "getpid", itertools.count().__next__)
        inner = data.tokenize_documents
        def overtaken(*args):
            monkeypatch.setattr(data, "tokenize_documents", inner)
            data.token_file(text_file, words)
            return inner(*args)
        monkeypatch.setattr(data, "tokenize_documents", overtaken)
        assert len(data.token_file(text_file, words)) == len(LINES)
        assert len(os.listdir(data.CACHE)) == 1

    def test_large_vocabulary(self):
        """ A vocabulary that 16 bits do not hold takes 32. """
        from transformers import BertTokenizer
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"word{i}" for i in range(70_000)]
        tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})
        document, = data.tokenize_documents(["word69999"], tokenizer)
        assert document.dtype == np.uint32 and document.tolist() == [70_004]
        masked = data.smae_batch([document], 8, (0.2, 0.4), tokenizer, [0])
        assert masked.texts[0].tolist() == [2, 70_004, 3]

    def test_validation_text_is_held_out(self, text_file, tmp_path, monkeypatch):
        """ No document of the validation loss is ever in a training batch. """
        seen = {True: set(), False: set()}
        true = pretrain_smae.smae_loss
        def spy(model, batch, masked, *rest):
            seen[model.training] |= {text.tobytes() for text in masked.texts}
            return true(model, batch, masked, *rest)
        monkeypatch.setattr(pretrain_smae, "smae_loss", spy)
        train(text_file, tmp_path / "out", "--max_length", "64", "--epochs", "2", "--max_steps", "0")
        assert len(seen[False]) == 4 and 24 <= len(seen[True]) <= 28 and not seen[True] & seen[False]


@pytest.mark.parametrize("flags, message", [
    (["--encoder_mask", "0.5", "--decoder_mask", "0.4"], "--encoder_mask 0.5 --decoder_mask 0.4"),
    (["--max_length", "4"], "--max_length: 4: must be 8 or more"),
    (["--streaming"], "give --max_steps"),
    (["--train_text", "nowhere.txt"], "nowhere.txt: no such file"),
    (["--train_text", "nowhere/set"], "--train_text nowhere/set: neither"),
    (["--train_text", "x.txt", "--streaming", "--max_steps", "1"], "--streaming with x.txt"),
    (["--resume"], "--resume: there is no"),
    (["--sizes", "9:8", "--train_text", "TEXT"], "--sizes asks for layer 9"),
    (["--batch_size", "500", "--train_text", "TEXT"], "--batch_size 500"),
    (["--batch_size", "8", "--micro_batch", "3", "--train_text", "TEXT"], "--micro_batch 3"),
    (["--init_from", "nowhere", "--train_text", "TEXT"], "nowhere: neither a folder"),
    (["--streaming", "--max_steps", "1", "--train_text", "docs"], "--streaming with docs"),
    (["--encoder_mask", "0.07", "--max_length", "8", "--train_text", "TEXT"],
     "--encoder_mask 0.07: hides none of the 6 tokens"),
    (["--encoder_mask", "0.01", "--train_text", "TEXT"], "--encoder_mask 0.01: hides none of the"),
])
def test_bad_input(flags, message, text_file, tmp_path, refused):
    """ Bad input ends the run with a line that names flag, value and rule. """
    flags = [text_file if flag == "TEXT" else flag for flag in flags]
    assert message in refused(pretrain_smae, ["--out_dir", str(tmp_path / "out"), "--device", "cpu", *flags])


def test_bad_input_is_one_line(tmp_path):
    """ A process that is given a file that is not there ends with status 2 and one line, without traceback. """
    flags = ["--out_dir", str(tmp_path / "out"), "--train_text", "nowhere.txt"]
    assert "nowhere.txt: no such file" in refused_process("pretrain_smae.py", *flags)


def test_a_run_is_not_overwritten(text_file, tmp_path, refused):
    """ An out_dir with a run in it is refused unless --overwrite or --resume is there. """
    train(text_file, tmp_path / "out", "--max_steps", "1")
    flags = ["--train_text", text_file, "--out_dir", str(tmp_path / "out"), *SMALL, "--max_steps", "1"]
    assert "holds a run; choose another folder, or add --overwrite or --resume" in refused(pretrain_smae, flags)
    train(text_file, tmp_path / "out", "--max_steps", "1", "--overwrite")
