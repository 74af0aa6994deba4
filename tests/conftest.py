""" Shared by the tests: no network, small models, small texts. """
import gzip, importlib.util, json, os, sys, zlib
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"   # before anything imports huggingface_hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch

import data
from model import Bert, hf_name, new_config, save_pretrained

def pytest_configure(config):
    config.addinivalue_line("markers", "optional: needs a package that requirements.txt leaves out; see .ci/run")

def needs(package):
    """ a decorator for tests that need an optional package; .ci/run installs each and runs pytest -m optional """
    missing = importlib.util.find_spec(package) is None
    skip = pytest.mark.skipif(missing, reason=f"{package}, which is optional, is not installed")
    return lambda test: pytest.mark.optional(skip(test))

@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory):
    """ tables of `datasets` go to a folder that ends with the tests; one thread: sums depend on how many """
    import datasets
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    torch.set_num_threads(1)

@pytest.fixture
def config():
    return new_config(vocab_size=97, hidden_size=48, num_hidden_layers=4, num_attention_heads=3, intermediate_size=80,
                      max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                      initializer_range=0.2, layer_norm_eps=1e-3)   # far from BERT's: errors show

@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return Bert(config).eval()

@pytest.fixture
def texts():
    """ 12 texts of 3 to 20 tokens, some of equal length, in no order of length """
    rng = np.random.default_rng(0)
    return [rng.integers(5, 97, size=n) for n in (7, 3, 20, 7, 12, 5, 20, 7, 9, 5, 11, 3)]

# The nouns of a sentence say which pair it belongs to: a small model learns to match them in seconds.
NOUNS = ("apple bridge candle dragon engine forest garden hammer "
         "island jacket kitchen lantern mirror needle orange pencil").split()

LINES = ["the apple stands beside the bridge in the morning light", "a dragon sleeps in the deep forest of the garden",
         "every engine of the island needs a hammer and a needle", "the kitchen has a lantern and an orange mirror"]

def write_jsonl(path, rows):
    """ -> the path, as a string """
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)

@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """ 64 (query, positive) rows """
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl",
                       [{"query": f"where is the {a} {b}", "positive": f"the {a} stands beside the {b} in the morning"}
                        for a in NOUNS[:8] for b in NOUNS[8:]])

@pytest.fixture
def beir(tmp_path):
    """ a BEIR folder of 4 documents: titles, grades, a document nobody judged, gz; two queries are documents, too """
    ((folder := tmp_path / "beir") / "qrels").mkdir(parents=True)
    corpus = [("d1", "apple", "an apple is a fruit"), ("d2", "", "a bridge crosses the river"),
              ("d3", "garden", "apple trees in the garden"), ("d4", "", "nothing of the kind")]
    with gzip.open(folder / "corpus.jsonl.gz", "wt") as file:
        file.writelines(f'{{"_id": "{i}", "title": "{title}", "text": "{text}"}}\n' for i, title, text in corpus)
    queries = [("q1", "apple fruit"), ("q2", "river bridge"), ("q3", "not judged"),
               ("d1", "an apple is a fruit"), ("d3", "garden apple trees in the garden")]
    (folder / "queries.jsonl").write_text("".join(f'{{"_id": "{i}", "text": "{text}"}}\n' for i, text in queries))
    for split, more in (("test", "q2\td2\t1\n"), ("dev", "")):
        judged = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td3\t1\n" + more
        (folder / "qrels" / f"{split}.tsv").write_text(judged)
    return folder

@pytest.fixture(scope="session")
def tokenizer(pairs_file):
    """ WordPiece, trained on the pairs """
    rows = [json.loads(line) for line in open(pairs_file)]
    return data.train_wordpiece((text for row in rows for text in row.values()), 200)

@pytest.fixture(scope="session")
def bert_folder(tokenizer, tmp_path_factory):
    """ a folder with a BERT of 3 layers x 48, no weight of which is at its usual start: errors show """
    torch.manual_seed(0)
    model = Bert(new_config(vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=3, num_attention_heads=3,
                            intermediate_size=80, max_position_embeddings=64, layer_norm_eps=1e-3))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name and p.dim() == 1), std=0.2)
    save_pretrained(model, tokenizer, folder := tmp_path_factory.mktemp("bert"))
    return str(folder)

def set_weights(module):
    """ Bert or MLMHead -> the same, float64, with weights that depend on nothing but their names: those of frozen.json
    (the names are transformers' own, because ours may change) """
    for name, parameter in module.double().named_parameters():
        name = hf_name(name).replace("cls.predictions.", "head.")
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        values = rng.normal(float("LayerNorm.weight" in name), 0.2, parameter.shape)
        parameter.data = torch.from_numpy(values)
    return module

def learned(model):
    """ -> the parameters that have a gradient: all but the biases of the keys """
    return [p for p in model.parameters() if p.requires_grad]

def assert_frozen(case, loss, module):
    """ The loss and the gradients are those of tests/frozen.json, to 1e-12: [loss, sum of the gradients' norms, sum of
    the gradients times cos(0), cos(1), ...], over all parameters but the biases of the keys, which softmax ignores """
    gradients = [p.grad for name, p in module.named_parameters()
                 if p.grad is not None and not name.endswith("key.bias")]
    norms = sum(gradient.norm() for gradient in gradients)
    sums = sum(gradient.flatten() @ torch.arange(gradient.numel()).double().cos() for gradient in gradients)
    want = json.loads((ROOT / "tests" / "frozen.json").read_text())[case]
    for found, figure, scale in zip((loss, norms, sums), want, (want[0], want[1], want[1]), strict=True):
        assert abs(found.item() - figure) < 1e-12 * scale, (case, found.item(), figure)

def plain_training(module, loss_of, rates, scale, decay):
    """ What the scripts do, as a plain PyTorch loop: AdamW, all matrices decay, embeddings learn `scale` times as fast,
    gradients of norm 1 at most. loss_of(step) -> loss; rates of the steps -> losses, norms before clipping """
    named = [(name, p) for name, p in module.named_parameters() if not name.endswith("key.bias")]
    embeddings, losses, norms = ("word.weight", "position.weight", "token_type.weight"), [], []
    optimizer = torch.optim.AdamW([{"params": [p], "weight_decay": decay if p.dim() > 1 else 0.0,
                                    "scale": scale if name.endswith(embeddings) else 1} for name, p in named])
    for step, lr in enumerate(rates):
        optimizer.zero_grad()
        loss = loss_of(step)
        loss.backward()
        norm = torch.stack([p.grad.norm() for _, p in named]).norm()
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
            for p in group["params"]:
                p.grad *= min(1, 1 / (norm + 1e-6))
        optimizer.step()
        losses.append(loss.item()), norms.append(norm.item())
    assert max(norms) > 1   # clipping bites
    return losses, norms

@pytest.fixture
def frozen_texts():
    """ the 15 texts of frozen.json """
    rng = np.random.default_rng(0)
    return [rng.integers(5, 97, size=n) for n in (7, 3, 20, 7, 12, 5, 20, 7, 9, 5, 11, 3, 8, 6, 14)]
