"""A hundred files that want more than to be read: nothing of them runs or writes outside, each ends in one line.

Every payload, if anything ever unpickled or evaluated it, would create the file `canary`; `outside` holds what links
and `../` point at. The commands run in this process, so a payload would run here too.
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pretrain.__main__ import main
from pretrain.bundles.bundle import load_bundle
from pretrain.checkpoints.commit import Store
from pretrain.checkpoints.seal import MANIFEST, manifest_bytes, seal_folder
from pretrain.errors import CheckpointError
from tests.pretrain.runs import make_data, write_config

pytestmark = pytest.mark.fault("hostile hostfile, environment, path, YAML, checkpoint or shard")


class Calls:
    """Pickles to a call of `function`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(canary: Path) -> dict[str, bytes]:
    touch = f"touch {canary}"
    system = Calls(os.system, touch)
    arrays = io.BytesIO()
    np.save(arrays, np.array([system, system], dtype=object), allow_pickle=True)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:  # the layout of torch.save
        zipped.writestr("archive/data.pkl", pickle.dumps({"model": system}, protocol=2))
        zipped.writestr("archive/version", "3\n")
        zipped.writestr("archive/byteorder", "little")
    named = io.BytesIO()
    with zipfile.ZipFile(named, "w") as zipped:  # the layout of numpy.savez
        zipped.writestr("weight.npy", arrays.getvalue())
    return {
        "system": pickle.dumps(system),
        "old protocol": pickle.dumps(system, protocol=0),
        "exec": pickle.dumps(Calls(exec, f"open({str(canary)!r}, 'w')"), protocol=2),
        "open": pickle.dumps({"weight": Calls(open, str(canary), "w")}, protocol=4),
        "torch archive": archive.getvalue(),
        "object array": arrays.getvalue(),
        "npz of objects": named.getvalue(),
        "gzip of a pickle": gzip.compress(pickle.dumps(system)),
    }


KINDS_OF_PAYLOAD = list(payloads(Path("unused")))
YAMLS = {
    "apply": "!!python/object/apply:os.system ['touch {canary}']",
    "new": "!!python/object/new:os.system ['touch {canary}']",
    "name": "name: !!python/name:os.system",
    "module": "name: !!python/module:antigravity",
    "nested": "name: x\nobjective: !!python/object/apply:subprocess.check_output [['touch', '{canary}']]",
    "state": "!!python/object/new:tuple [!!python/object/new:map [!!python/name:eval , [\"open('{canary}','w')\"]]]",
    "key": "? !!python/object/apply:os.system ['touch {canary}']\n: 1",
    "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "itself": "name: &a [*a]",
    "deep": "name: " + "[" * 100_000,
    "base outside": "base: ../../../../../../../../etc/passwd\nname: x",
    "base is a device": "base: /dev/zero\nname: x",
    "name outside": "name: ../../outside/run\ndata: {{path: d}}\nobjective: {{name: janus}}\nbatch: {{samples: 1}}",
}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder, a run and a bundle that are what they seem."""
    folder = tmp_path_factory.mktemp("honest")
    assert main(["train", str(write_config(folder, make_data(folder, 60))), "train.steps=2", "train.save_every=1"]) == 0
    assert main(["handoff", str(folder / "runs" / "tiny"), "--out", str(folder / "bundle")]) == 0
    return folder


@pytest.fixture
def ground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`tmp_path / cell` to play in; afterwards the canary must not exist and nothing beside the cell have changed."""
    cell, outside = tmp_path / "cell", tmp_path / "outside"
    cell.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("do not touch")
    monkeypatch.chdir(cell)
    yield cell
    beside = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if cell not in (path, *path.parents)}
    assert beside == {"outside", "outside/secret"} and (outside / "secret").read_text() == "do not touch"


def hostile(ground: Path, kind: str) -> bytes:
    return payloads(ground.parent / "canary")[kind]


def one_line(captured: "pytest.CaptureFixture[str]", code: int, expected: int) -> None:
    error = captured.readouterr().err.strip().splitlines()[-1]
    assert code == expected, error
    assert error.startswith("error: ") and len(error) < 1_000


def test_the_payloads_do_work_where_they_are_let(tmp_path: Path) -> None:
    made = payloads(tmp_path / "canary")
    for kind in ("system", "old protocol", "exec", "open"):
        pickle.loads(made[kind])
        (tmp_path / "canary").unlink()
    np.load(io.BytesIO(made["object array"]), allow_pickle=True)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("what", YAMLS)
def test_yaml(what: str, ground: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = YAMLS[what]
    config = ground / "a.yaml"
    config.write_text(text if what in ("laughs", "deep") else text.format(canary=ground.parent / "canary"))
    one_line(capsys, main(["train", str(config)]), 3)


@pytest.mark.parametrize("kind", KINDS_OF_PAYLOAD)
@pytest.mark.parametrize("file", ["state-rank0.safetensors", "rng-rank0.safetensors", "state.json", "progress.json"])
def test_checkpoint(file: str, kind: str, honest: Path, ground: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sealed anew, as someone who can write there would: the hashes are right, the content is not."""
    shutil.copytree(honest / "runs", ground / "runs")
    for commit in Store(ground / "runs" / "tiny").commits():
        (commit / file).write_bytes(hostile(ground, kind))
        seal_folder(commit, json.loads((commit / MANIFEST).read_bytes())["step"])
    config = write_config(ground, honest / "data")
    one_line(capsys, main(["train", str(config), "train.steps=3"]), 5)


@pytest.mark.parametrize("how", ["parent", "absolute", "link", "folder", "device"])
def test_checkpoint_that_leads_outside(
    how: str, honest: Path, ground: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names and links in a manifest: the commit is not used, and retention deletes nothing beyond it."""
    shutil.copytree(honest / "runs", ground / "runs")
    outside = ground.parent / "outside"
    for commit in Store(ground / "runs" / "tiny").commits():
        manifest = json.loads((commit / MANIFEST).read_bytes())
        weights = commit / "state-rank0.safetensors"
        if how in ("parent", "absolute"):
            name = "../../../../../outside/secret" if how == "parent" else str(outside / "secret")
            secret = (outside / "secret").read_bytes()
            manifest["files"][name] = {"bytes": len(secret), "sha256": hashlib.sha256(secret).hexdigest()}
        else:
            weights.unlink()
            target = {"link": outside / "secret", "folder": outside, "device": Path("/dev/zero")}[how]
            weights.symlink_to(target)
        (commit / MANIFEST).write_bytes(manifest_bytes(manifest["step"], manifest["files"]))
    config = write_config(ground, honest / "data")
    one_line(capsys, main(["train", str(config), "train.steps=4", "train.keep=1"]), 5)


@pytest.mark.parametrize("kind", KINDS_OF_PAYLOAD)
@pytest.mark.parametrize(
    "file", ["model.safetensors", "golden.safetensors", "config.json", "tokenizer.json", "provenance.json"]
)
def test_bundle(file: str, kind: str, honest: Path, ground: Path) -> None:
    shutil.copytree(honest / "bundle", ground / "bundle")
    (ground / "bundle" / file).write_bytes(hostile(ground, kind))
    seal_folder(ground / "bundle", step=0)
    with pytest.raises(CheckpointError) as found:
        load_bundle(ground / "bundle")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("kind", KINDS_OF_PAYLOAD)
@pytest.mark.parametrize("file", ["index.npy", "manifest.json", "tokenizer.json"])
def test_data_folder(file: str, kind: str, honest: Path, ground: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(honest / "data", ground / "data")
    (ground / "data" / file).write_bytes(hostile(ground, kind))
    one_line(capsys, main(["train", str(write_config(ground, ground / "data"))]), 4)
