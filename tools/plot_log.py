"""
Draw a training: the loss of the smallest and of the largest size over the steps, from log.jsonl.

    python -m tools.plot_log out/srl figure.svg      # InfoNCE; of pretrain_smae.py the masked words of the encoder
"""
import argparse
from pathlib import Path

from model import run_script

def main(args):
    import matplotlib, pandas   # pip install matplotlib
    matplotlib.rcParams |= {"backend": "agg", "svg.fonttype": "none"}   # no window; text stays text
    log = pandas.read_json(Path(args.run, "log.jsonl"), lines=True).dropna(subset="loss")
    log = log.drop_duplicates("step", keep="last").set_index("step")   # a resumed run repeats some
    losses = log.filter(regex="^(nce|mlm) ")
    axes = losses[[losses.columns[0], losses.columns[-1]]].plot(figsize=(6, 3.5), color=["#D55E00", "#0072B2"],
                                                                ylabel="loss (down is better)")
    axes.legend(frameon=False, labelcolor="linecolor")
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.savefig(args.out, bbox_inches="tight", dpi=150)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", help="the folder of a training")
parser.add_argument("out", metavar="FILE.svg|png", help="the figure")

if __name__ == "__main__":
    run_script(main, parser.parse_args)
