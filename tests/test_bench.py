""" The benchmark, which takes minutes, is not run by the tests; but it can be started. """
import re
import sys
from pathlib import Path

import pytest

import bench


def test_help(monkeypatch, capsys):
    """ tests/bench.py --help prints its flags: all that the benchmark imports from the scripts is there. """
    monkeypatch.setattr(sys, "argv", ["bench.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 0 and "--batch_size" in capsys.readouterr().out


def test_names_of_the_scripts():
    """ Every function that the benchmark takes from data.py or evaluate.py, as data.tokenize, is there. """
    names = re.findall(r"\b(data|evaluate)\.([a-z]\w+)", Path(bench.__file__).read_text().split('"""', 2)[2])
    assert len(set(names)) >= 4
    assert [name for module, name in names if not hasattr(getattr(bench, module), name)] == []
