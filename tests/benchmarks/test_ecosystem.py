"""The table of docs/ecosystem.md: what was tried, as it was written down, and trials that can fail."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import ecosystem
from ecosystem_models import Transformers, Trwkv
from ecosystem_setting import Setting, same

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "ecosystem_cpu.json"
SLOW = {
    "bf16_decoding",
    "beam_search",
    "compile",
    "export",
    "lm_eval",
    "peft",
}  # seconds each, or not installed


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("setting"))


def test_the_table_is_what_was_found() -> None:
    content = json.loads(RESULTS.read_text())
    for peer in content["peers"].values():
        assert peer["cells"].keys() == ecosystem.FEATURES.keys()
    shown = re.search(
        r"^<!-- python .* -->\n(.*?)\n<!-- end -->$", (ROOT / "docs/ecosystem.md").read_text(), re.M | re.S
    )
    assert shown[1] == ecosystem.table(content)


def test_our_column_again(setting) -> None:
    peer, written = Trwkv(setting), json.loads(RESULTS.read_text())["peers"]["trwkv"]["cells"]
    for feature in ecosystem.FEATURES.keys() - SLOW:
        assert ecosystem.trial(getattr(peer, feature), setting) == written[feature], feature


def test_what_is_wrong_is_said(setting) -> None:
    """transformers' model knows no padding; and a result that is not right is not a yes."""
    peer = Transformers(setting)
    assert ecosystem.trial(peer.left_padding, setting).startswith("no: the result is off by")
    assert ecosystem.trial(lambda: peer.load(setting.folder / "nothing"), setting).startswith("no: OSError: ")
    for wrong in (torch.tensor([1.0, 2.1]), torch.tensor([1.0, float("nan")])):
        assert ecosystem.trial(lambda x=wrong: same(x, torch.tensor([1.0, 2.0])), setting).startswith("no: ")


def test_what_is_absent_is_said(setting, monkeypatch) -> None:
    monkeypatch.setitem(ecosystem.PEERS, "nothing", (Trwkv, "no-such-package"))
    assert set(ecosystem.tried("nothing", setting).values()) == {"not installed"}
    monkeypatch.setitem(sys.modules, "peft", None)
    assert ecosystem.trial(Transformers(setting).peft, setting) == "not tried: peft is not installed"
