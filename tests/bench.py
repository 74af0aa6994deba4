"""
What does packing buy? One SRL step of this project against the same step on padded batches of transformers' BertModel: same
weights, texts, loss, dtype and optimizer, in turn, medians. Not a test: pytest does not collect it.

    python tests/bench.py MODEL PAIRS [--batch_size 64] [--max_length 64] [--dtype bfloat16]

MODEL: a BERT folder; PAIRS: anything finetune_srl.py --train_pairs takes.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
from finetune_srl import srl_loss
from model import from_pretrained, pack, paper_sizes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=7)
    args = parser.parse_args()

    from transformers import BertModel
    tokenizer = data.load_tokenizer(args.model)
    pairs = data.tokenize_pairs(data.load_pairs(args.pairs), tokenizer, args.max_length, args.max_length)
    ours = from_pretrained(args.model, hidden_dropout_prob=args.dropout, attention_probs_dropout_prob=args.dropout).train()
    theirs = BertModel.from_pretrained(args.model, add_pooling_layer=False, hidden_dropout_prob=args.dropout,
                                       attention_probs_dropout_prob=args.dropout).train()
    sizes = paper_sizes(ours.config)
    layers = [layer for layer, _ in sizes]
    autocast = torch.autocast("cpu", getattr(torch, args.dtype), enabled=args.dtype != "float32")

    def encode_packed(texts):
        return ours.encode(pack(texts), layers)

    def encode_padded(texts):
        longest = max(map(len, texts))
        input_ids = torch.zeros(len(texts), longest, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for i, text in enumerate(texts):
            input_ids[i, :len(text)], mask[i, :len(text)] = torch.from_numpy(text.astype("int64")), 1
        hidden = theirs(input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
        weights = mask[:, :, None] / mask.sum(1)[:, None, None]
        return {layer: (hidden[layer] * weights).sum(1) for layer in layers}

    contestants = {"packed": (encode_packed, ours.configure_optimizers(1e-6, 0.0)),
                   "padded": (encode_padded, torch.optim.AdamW(theirs.parameters(), lr=1e-6, fused=True))}
    seconds = {name: [] for name in contestants}
    useful = padded = 0
    for step in range(-2, args.steps):   # two to warm up
        queries, passages = data.srl_batch(pairs, args.batch_size, 1, 1, step + 2)
        texts = queries + passages
        useful, padded = useful + sum(map(len, texts)), padded + len(texts) * max(map(len, texts))
        for name, (encode, optimizer) in contestants.items():
            start = time.perf_counter()
            with autocast:
                taps = encode(texts)
            loss, _, _ = srl_loss({n: t[:len(queries)] for n, t in taps.items()}, {n: t[len(queries):] for n, t in taps.items()},
                                  sizes, "cosine", 0.05, 1.0)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
            optimizer.step()
            if step >= 0:
                seconds[name].append(time.perf_counter() - start)
    packed_time, padded_time = (statistics.median(seconds[name]) for name in ("packed", "padded"))
    print(f"{args.batch_size} queries a step, {useful / (args.steps + 2):.0f} tokens, {padded / (args.steps + 2):.0f} when padded to the longest "
          f"({useful / padded:.0%} of them useful; packed 100%), {args.dtype}, dropout {args.dropout}")
    print(f"padded {1000 * padded_time:.0f} ms, packed {1000 * packed_time:.0f} ms: {padded_time / packed_time:.2f}x")


if __name__ == "__main__":
    main()
