"""
How long does each size of a model take to embed a text? And a training step, here and elsewhere? On the CPU.

    python -m tools.bench out/srl
    python -m tools.bench bert-base-uncased my_triplets.jsonl --batch_size 32 --smae my_text.txt

Contestants of the training step are processes that take their steps in turn, on the same token ids: packing or padding,
forward, loss, backward, clipping, fused AdamW. Matryoshka2dLoss trains the last layer and one other a step, and one dim
of each. SMAE has the shape of BERT-base. A contestant of your own: a function like these, and a line in CONTESTANTS.
"""
import argparse, functools, multiprocessing, resource, time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import numpy as np
import torch
from transformers import BertModel

import data
from evaluate import embed_texts
from finetune_srl import train_step
from model import Bert, HelpFormatter, fast_dtype, load_model, new_config, pack, run_script
from pretrain_smae import SMAE, MLMHead, smae_loss

# ---- contestants: args -> model, function of a batch -> loss; of SRL a batch is data.Batch, of SMAE data.Masked ------
def here(args, last=0):
    """ finetune_srl.py at all sizes of the model or, with last=-1, at the full size alone """
    model, _ = load_model(args.model, pooling="mean", similarity="cosine", **args.dropouts)
    return model, lambda batch: train_step(model, None, batch, args.sizes[last:], args, step=0)["loss"]

def transformers(args):
    """ the same, but the encoder is transformers' BertModel, which pads """
    model = BertModel.from_pretrained(args.model, add_pooling_layer=False, **args.dropouts)
    def encode(batch, layers):
        ids, mask = torch.zeros(2, len(batch.starts), batch.groups[-1][1], dtype=torch.long)         # (B, T) each
        ids[batch.text_ids, batch.position_ids], mask[batch.text_ids, batch.position_ids] = batch.input_ids, 1
        hidden = model(ids, mask, output_hidden_states=True).hidden_states                            # (B, T, C) each
        return {n: (hidden[n].float() * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True) for n in layers}
    model.encode, model.config.similarity = encode, "cosine"
    return model, lambda batch: train_step(model, None, batch, args.sizes, args, step=0)["loss"]

def sentence_transformers(args, two_d=False):
    """ its MultipleNegativesRankingLoss, maybe within its Matryoshka2dLoss """
    from sentence_transformers import SentenceTransformer, losses
    model = SentenceTransformer(args.model, device="cpu", config_kwargs=args.dropouts)
    loss = losses.MultipleNegativesRankingLoss(model, scale=1 / args.temperature)
    loss = losses.Matryoshka2dLoss(model, loss, sorted({d for _, d in args.sizes}, reverse=True)) if two_d else loss
    def loss_of(batch):
        columns = batch.queries, batch.passages[:len(batch.queries)], batch.passages[len(batch.queries):]
        return loss([model.tokenizer.pad({"input_ids": ids}, return_tensors="pt") for ids in columns if ids], None)
    return model, args.autocast()(loss_of)

def smae_here(args):
    """ pretrain_smae.py """
    model, sizes = SMAE(Bert(args.base), MLMHead(args.base)), args.base.sizes
    return model, args.autocast()(lambda masked: smae_loss(model, pack(masked.texts), masked, sizes)[0])

CONTESTANTS = {"SRL here, all sizes": here, "SRL here, full size alone": functools.partial(here, last=-1),
               "SRL Matryoshka2dLoss": functools.partial(sentence_transformers, two_d=True),
               "SRL MultipleNegativesRankingLoss": sentence_transformers, "SRL transformers, padded": transformers,
               "SMAE here": smae_here}
READY = []   # in the process of a contestant: its model, function and optimizer

def step(contestant, args, batch):
    """ in that process -> seconds, peak GB, loss """
    if not READY:
        READY.extend(contestant(args))
        READY.append(torch.optim.AdamW(READY[0].train().parameters(), lr=1e-6, fused=True))
    (model, loss_of, optimizer), start = READY, time.perf_counter()
    if (loss := loss_of(batch)).requires_grad:   # else train_step has done it
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, loss.item()

def embedding_speed(model, tokenizer, dtype):
    """ print of each size the ms to tokenise and embed one query, the median of 50, and the texts a second """
    texts = [f"{i}: a passage of about thirty words, as long as the ones that are searched most often, made of "
             "ordinary words so that the tokenizer and the model have as much to do as in real use" for i in range(512)]
    def seconds(texts):
        start = time.perf_counter()
        embed_texts(model, tokenizer, texts, [layer], dtype)
        return time.perf_counter() - start
    print(f"{dtype:12}{'ms/query':>10}{'texts/s':>10}")
    for layer, dim in model.config.sizes:
        query = np.median([seconds(["how do I invert a large matrix"]) for _ in range(53)][3:])   # three warm up
        print(f"{layer}:{dim:<10}{1000 * query:10.2f}{len(texts) / seconds(texts):10.0f}")

def main(args):
    """ batches, everybody's steps, a table for each kind of step """
    model, tokenizer = load_model(args.model)
    if not args.pairs:
        return embedding_speed(model, tokenizer, args.dtype)
    args.dropouts = {"hidden_dropout_prob": args.dropout, "attention_probs_dropout_prob": args.dropout}
    args.autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=args.dtype == "bfloat16")
    args.sizes, args.base = model.config.sizes, new_config(vocab_size=len(tokenizer), **args.dropouts)
    table, length, rounds = data.load_pairs(args.pairs), args.max_length, range(args.rounds + 2)   # two to warm up
    pairs = [data.tokenize_pairs(args.pairs, table, tokenizer, length, length, model.config)]
    batches = {"SRL": [data.srl_batch(pairs, min(args.batch_size, len(table)), 1, length, 0, i) for i in rounds]}
    if args.smae:
        text = np.concatenate(data.tokenize_text(args.smae, tokenizer)[:1000]["ids"])
        windows = np.resize(text, (len(rounds), 16, 126))   # 128 tokens with [CLS] and [SEP]
        batches["SMAE"] = [data.smae_batch(windows[i], 128, (0.2, 0.4), tokenizer, [i]) for i in rounds]
    for kind in batches:
        workers = {name: ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for name in CONTESTANTS
                   if name.startswith(kind) and (find_spec("sentence_transformers") or "Loss" not in name)}
        found = np.array([[worker.submit(step, CONTESTANTS[name], args, batch).result()
                           for name, worker in workers.items()] for batch in batches[kind]])   # (rounds, names, 3)
        medians, peaks, losses = np.median(found[2:, :, 0], axis=0), found[-1, :, 1], found[0, :, 2]
        print(f"\n{args.dtype:42}{'ms':>8}{'x ours':>8}{'GB':>8}{'loss of the first step':>24}")
        for name, seconds, peak, loss in zip(workers, medians, peaks, losses):
            workers[name].shutdown()
            print(f"{name:42}{1000 * seconds:8.0f}{seconds / medians[0]:8.2f}{peak:8.2f}{loss:24.6f}", flush=True)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
parser.add_argument("model", help="a BERT: a folder, or a name of the hub")
parser.add_argument("pairs", nargs="?", help="of the step: as finetune_srl.py --train_pairs, with negatives")
parser.add_argument("--smae", metavar="TEXT", help="what pretrain_smae.py --train_text takes: time that step, too")
parser.add_argument("--batch_size", type=int, default=64, help="pairs a step; of SMAE 16 windows of 128 tokens")
parser.add_argument("--max_length", type=int, default=64, help="tokens of a query and of a passage")
parser.add_argument("--rounds", type=int, default=9, help="steps of each contestant, after two to warm up")
parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=fast_dtype(), help="of the matrix products")
parser.add_argument("--dropout", type=float, default=0.1, help="in the hidden layers and the attention")
parser.set_defaults(device="cpu", seed=1, temperature=0.05, kl_weight=1.0)

if __name__ == "__main__":
    run_script(main, parser.parse_args)
