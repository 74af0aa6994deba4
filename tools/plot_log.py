"""
Draw a training: the loss of the smallest and of the largest size over the steps, from log.jsonl.

    python -m tools.plot_log out/srl figure.svg      # InfoNCE; of pretrain_smae.py the masked words of the encoder
"""
import argparse, json
from pathlib import Path

from model import run_script

def main(args):
    import matplotlib   # pip install matplotlib
    matplotlib.rcParams |= {"backend": "agg", "svg.fonttype": "none"}   # no window; text stays text
    from matplotlib import pyplot
    lines = Path(args.run, "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = {record["step"]: record for record in map(json.loads, lines) if "loss" in record}
    kind = "mlm" if any("mlm" in name for name in records[min(records)]) else "nce"
    names = [name for name in records[min(records)] if name.startswith(f"{kind} ")]
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for name, color in ((names[0], "#D55E00"), (names[-1], "#0072B2")):
        axes.plot(list(records), [record.get(name) for record in records.values()], color=color, label=name)
    axes.set(xlabel="step", ylabel="loss (down is better)")
    axes.legend(frameon=False, labelcolor="linecolor")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.out, dpi=150)

def parse_args(argv=None):
    """ command line -> args """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a training")
    parser.add_argument("out", metavar="FILE.svg|png", help="the figure")
    return parser.parse_args(argv)

if __name__ == "__main__":
    run_script(main, parse_args)
