"""Tests of erpm.py: CPU, no network, tiny synthetic data.  A test's name is the law it checks."""
import ast
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, TensorDataset

import erpm

HERE = Path(__file__).parent
SOURCE = (HERE / "erpm.py").read_text()
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
SLOW = bool(os.environ.get("ERPM_SLOW"))
TINY = """\
model.student=cifar:resnet8-s2 model.teacher=cifar:resnet8-s2 distill.tune=2 distill.head=1
data.n_test=60 data.n_train=600 pretrain.n_images=0 robustify.n_images=0 distill.n_images=0
pretrain.batch=50 pretrain.epochs=2 robustify.batch=50 robustify.epochs=1 distill.batch=50
distill.epochs=2 eval.batch=32 eval.passes=3 eval.n_cell=20 runtime.log_every=2 runtime.amp=none
runtime.save_every=3""".split()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runs(*words):
    """What a command that must succeed prints, run in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert erpm.main([str(w) for w in words]) == 0
    return out.getvalue()


def fails(capsys, *words):
    """The one line that a failing command prints on stderr."""
    assert erpm.main([str(w) for w in words]) == 2
    line = capsys.readouterr().err
    assert line.startswith("erpm.py: ") and line.count("\n") == 1
    return line


def refuses(says):
    """Context in which a UserError of one line is raised that holds the words."""
    return pytest.raises(erpm.UserError, match=re.escape(says) + r"[^\n]*\Z")


def forked(work, *args):
    """A process that exits with what work returns; it starts much faster than a new Python."""
    fork = torch.multiprocessing.get_context("fork")
    job = fork.Process(target=lambda: os._exit(work(*args) or 0))
    job.start()
    return job


def fork_all(n, work):
    """Calls work(rank) in n processes."""
    jobs = [forked(work, rank) for rank in range(n)]
    for job in jobs:
        job.join(200)
    assert [job.exitcode for job in jobs] == [0] * n


def in_processes(n, cwd, *words):
    """Runs a command as torchrun does on n processes."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])

    def work(rank):
        os.chdir(cwd)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n),
                       "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        return erpm.main([str(w) for w in words])
    fork_all(n, work)


def block(i, o):
    return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())


def tiny_net(classes=5, width=8):
    torch.manual_seed(0)
    return nn.Sequential(block(3, width), block(width, width), block(width, width),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)).eval()


def images(n=16, size=32, seed=0):
    return torch.randint(0, 256, (n, 3, size, size),
                         generator=erpm.rng("test", seed)).to(torch.uint8)


def shown(classes=5, n=16, size=32, ids=None):
    return erpm.ImageSet("x", np.arange(n) * 7 % classes, map(str, range(classes)),
                         erpm.View(size), images=images(n, size), ids=ids)


def make_tree(root, classes=("cat", "dog"), n=6, splits=("train", "val"), size=(40, 40)):
    for split in splits:
        for k, c in enumerate(classes):
            (root / split / c).mkdir(parents=True)
            for i in range(n):
                g = np.random.default_rng([k, i])
                a = g.integers(0, 256, (size[0] + i, size[1], 3), np.uint8)
                Image.fromarray(a).save(root / split / c / f"{i}.png")


def saved(path, net, home="shapes", **more):
    """The network in a file, as a stage leaves it."""
    card = {"home": home, "classes": tuple(erpm.SHAPES), "view": erpm.View(32, 1.0), "size_px": 32}
    erpm.save(path, net, **card | more)
    return net


def result_rows(run):
    return [json.loads(line) for line in (Path(run) / "results.jsonl").read_text().splitlines()]


def untimed(run):
    timing = ("seconds", "images_per_s", "processes", "sum")
    return [{k: v for k, v in r.items() if k not in timing} for r in result_rows(run)]


def equal(a, b):
    a, b = (m.state_dict() if isinstance(m, nn.Module) else m for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# ==== the file itself ====

TREE = ast.parse(SOURCE)
TOP = {n.name: n for n in TREE.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
FUNCTIONS = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef)]


def test_sections_are_those_of_the_docstring():
    banners = re.findall(r"^# ==== (\d+\. [A-Z]+) ====$", SOURCE, re.M)
    listed = re.findall(r"^    (\d+\. [A-Z]+)$", ast.get_docstring(TREE, clean=False), re.M)
    assert banners == listed and len(banners) == 12


def test_nothing_is_used_before_it_is_defined():
    lines = {t.id: n.lineno for n in reversed(TREE.body) for t in ast.walk(n)
             if isinstance(n, (ast.Assign, ast.AnnAssign)) and isinstance(t, ast.Name)
             and isinstance(t.ctx, ast.Store)}
    lines |= {name: node.lineno for name, node in TOP.items()}
    for name, node in TOP.items():
        hints = {id(x) for n in ast.walk(node)
                 for a in (getattr(n, "annotation", None), getattr(n, "returns", None))
                 if a for x in ast.walk(a)}
        names = [x for x in ast.walk(node) if isinstance(x, ast.Name) and id(x) not in hints]
        local = {x.id for x in names if isinstance(x.ctx, ast.Store)} | {
            a.arg for a in ast.walk(node) if isinstance(a, ast.arg)}
        later = {x.id for x in names if lines.get(x.id, 0) > node.end_lineno} - local
        assert not later, f"{name} uses {later} that stand below"


def test_functions_are_short_lines_narrow_and_public_names_documented():
    lengths = [n.end_lineno - n.lineno + 1 for n in FUNCTIONS]
    assert max(lengths) <= 60 and statistics.median(lengths) <= 12
    both = SOURCE + Path(__file__).read_text()
    assert max(map(len, both.splitlines())) <= 100 and not re.search("TODO|FIXME", SOURCE)
    assert all(n.startswith("_") or ast.get_docstring(node) for n, node in TOP.items())


def test_import_has_no_side_effect_and_a_held_loader_keeps_no_process_from_ending(tmp_path):
    make_tree(tmp_path / "set")
    code = ("import torch, os, sys; "
            "before = torch.random.get_rng_state(), dict(os.environ), os.listdir()\n"
            f"sys.path.insert(0, {str(HERE)!r}); sys.argv = ['x', '--bad']; import erpm\n"
            "assert torch.equal(before[0], torch.random.get_rng_state())\n"
            "assert before[1:] == (dict(os.environ), os.listdir())\n"
            "assert not {'timm', 'open_clip', 'matplotlib'} & set(sys.modules)\n"
            "s = erpm.open_set('folder:set', erpm.Data(), 'train')\n"
            "it = iter(erpm.loader(s, 1, batch_sampler=erpm.Batches(len(s), 4, 0)))\n"
            "next(it); 1 / 0")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENV, text=True,
                          capture_output=True, timeout=300)
    assert done.stdout == "" and re.match("Traceback[^$]*ZeroDivisionError", done.stderr)


def test_every_recipe_of_config_yaml_loads():
    for name in erpm.read_yaml(HERE / "config.yaml"):
        assert erpm.resolve([], name).run == name


def test_every_command_of_the_readme_parses():
    lines = re.findall(r"^ *(?:torchrun.* |python )erpm\.py (.*?)(?:  +#.*)?$",
                       (HERE / "README.md").read_text(), re.M)
    assert len(lines) >= 15
    for line in [part for line in lines for part in re.split(r" && python erpm\.py ", line)]:
        args = erpm.parse(shlex.split(line))
        assert args.command in erpm.COMMANDS
        erpm.resolve(args.words, "" if args.config else args.recipe)


def test_the_python_of_the_readme_runs(here):
    [code] = re.findall(r"^```python\n(.*?)^```", (HERE / "README.md").read_text(), re.M | re.S)
    assert len(code.splitlines()) <= 20
    names = {}
    exec(code.replace("import erpm, torch", "import torch"), {"erpm": erpm} | names, names)
    assert names["p"].probs.shape == (8, 10) and set(names["row"]["rules"]) >= set(erpm.RULES)
    assert equal(names["student"], names["again"])


# ==== basics and config ====

def test_seeds_are_functions_of_the_key():
    assert erpm.fold(1, "a") == erpm.fold(1, "a") != erpm.fold(1, "b")
    assert torch.equal(*(torch.rand(3, generator=erpm.rng("k", 1)) for _ in range(2)))


def test_precedence_is_default_recipe_words():
    cfg = erpm.resolve(["distill.lr=0.5", "seed=3"], "demo")
    assert (cfg.distill.lr, cfg.seed, cfg.run) == (0.5, 3, "demo-s3")
    names = [erpm.resolve(words, recipe).run for words, recipe in (
        (["data.name=cifar10"], "demo"), ([], ""), (["data.name=folder:a/b c"], ""),
        (["run=x", "seed=2"], "demo"), (["recipe=demo-clip"], "demo"))]
    assert names == ["demo-cifar10", "shapes", "folder-a-b-c", "x", "demo-clip"]
    assert erpm.configure(erpm.parse(["eval", "--model", "a", "seed=1"])).run == "models"


def test_without_a_recipe_the_defaults_that_help_prints_are_what_runs(here, capsys):
    with pytest.raises(SystemExit):
        erpm.main(["distill", "--help"])
    found = dict(re.findall(r"^  ([a-z_.]+)=(.*?)(?:  .*)?$", capsys.readouterr().out, re.M))
    words = [f"{k}={v.strip()}" for k, v in found.items() if k != "key"]
    cfg = erpm.configure(erpm.parse(["distill"]))
    assert dataclasses.replace(erpm.resolve(words), run=cfg.run) == cfg
    assert len(words) == len(erpm.FIELDS) and cfg.recipe == ""


@pytest.mark.parametrize("key", [k for k, f in erpm.FIELDS.items() if f.type in ("int", "float")])
def test_every_number_has_a_range_and_nothing_outside_it_passes(key):
    field = erpm.FIELDS[key]
    least, most = field.metadata["valid"]
    for good in (field.default, least, most):
        text = str(int(good) if field.type == "int" else float(good))
        assert erpm.typed(text, key, "x") == erpm.typed(good, key, "x") == good
    for bad in (least - 1, most + 1, "nan", "inf", math.inf, math.nan, "x", "", None, True, [1]):
        with refuses(f"here: {key}: expected {field.type} of "):
            erpm.typed(bad, key, "here")


@pytest.mark.parametrize("words, says", [
    (["distill.lrr=1"], "'distill.lrr'; did you mean 'distill.lr'?"),
    (["distill.lr=fast"], "command line: distill.lr: expected float of 1e-09 to 100, got 'fast'"),
    (["distill=3"], "unknown setting in command line: 'distill'"), (["nonsense"], "'nonsense'"),
    (["data.crop=yes"], "data.crop: expected bool, got 'yes'"),
    (["distill.head=9"], "distill.head: expected 0 to distill.tune = 5, got 9"),
    (["distill.method=ermp"], "unknown distill.method 'ermp'; did you mean 'erpm'?"),
    (["data.size_px=16"], "expected 0 or 32 to 512, got 16"),
    (["distill.accum=7"], "distill.batch: 64 images cannot be shared equally")])
def test_a_bad_word_is_one_clear_line(words, says):
    with refuses(says):
        erpm.resolve(words, "demo")


@pytest.mark.parametrize("text, says", [
    ("demo: {seed: 1}\ndemo: {seed: 2}", "'demo' stands twice"),
    ("demo: {run: no}", "demo: run: expected str (quote it"),
    ("demo: {seeds: 1}", "'seeds'; did you mean 'seed'?"),
    ("demo: {distill: {lr: 1e-3, batch: 2.5}}", "distill.batch: expected int of 1 to"),
    ("demo: [1, 2]", "demo: expected a mapping of settings, got [1, 2]"),
    ("demo: {data: }", "'data'"), ("", "expected a mapping at the top"),
    ("demo: [", "not valid YAML"), ("demo: {? [1] : 2}", "not valid YAML"),
    ("demo: &a {data: *a}", "'data.data'"), ("other: {}", "unknown recipe")])
def test_yaml_traps_are_errors_of_one_line(tmp_path, text, says):
    (tmp_path / "c.yaml").write_text(text)
    with refuses(says):
        erpm.resolve([], "demo", tmp_path / "c.yaml")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    def breaks(file):
        file.write(b"half")
        raise OSError("disk full")
    path = tmp_path / "new/x.txt"
    for left in ([], ["old"]):
        with refuses(f"cannot write {path}: disk full"):
            erpm.write_atomically(path, breaks)
        assert [p.read_text() for p in path.parent.iterdir()] == left
        erpm.write_atomically(path, "old")


@pytest.mark.parametrize("place", ["run=x", "out=runs/x", "out=/proc/none", f"run={'x' * 300}"])
@pytest.mark.parametrize("words", [["pretrain", *TINY], ["eval", "--set", "shapes"], ["bench"]])
def test_a_run_that_cannot_be_written_or_read_is_one_line_and_code_2(place, words, here, capsys):
    (here / "runs").mkdir()
    (here / "runs/x").write_text("a file")
    assert len(fails(capsys, *words, place)) < 1000


# ==== data ====

def test_shapes_are_functions_of_the_index_and_vary():
    for style, size in (("", 32), ("r", 64)):
        x, y = erpm.make_shapes(200, size, "test", style)
        assert torch.equal(x[:50], erpm.make_shapes(50, size, "test", style)[0])
        assert not torch.equal(x[:50], erpm.make_shapes(50, size, "train", style)[0])
        assert x.shape == (200, 3, size, size) and x.float().std(0).mean() > 5
        assert np.bincount(y).tolist() == [20] * 10


def test_samples_are_functions_of_seed_epoch_and_index(tmp_path):
    make_tree(tmp_path)
    for name in ("shapes", f"folder:{tmp_path}"):
        s = erpm.open_set(name, erpm.Data(n_train=11, size_px=32), "train").training(seed=1)
        alone = s.__getitems__([(2, 5)])[0]
        assert torch.equal(alone, s.__getitems__([(2, 9), (2, 5), (2, 1)])[0][1:2])
        some, later = ([(e, k) for k in range(5)] for e in (2, 3))
        for t, keys in ((s.training(seed=2), some), (s, later)):
            assert not torch.equal(s.__getitems__(some)[0], t.__getitems__(keys)[0])


@pytest.mark.parametrize("crop, flip", [(True, True), (True, False), (False, True), (False, False)])
def test_shift_and_flip_is_the_slow_obvious_one(crop, flip):
    x, u = images(4), np.array([[0, 0, 0], [.5, .5, .9], [.99, .2, .1], [.3, .7, .6]], np.float32)
    got = erpm.shift_and_flip(x, u, crop, flip)
    for i, (a, b, mirror) in enumerate(u):
        padded = F.pad(x[i:i + 1].float(), (4,) * 4, mode="reflect")
        r, c = (int(a * 9), int(b * 9)) if crop else (4, 4)
        want = padded[0, :, r:r + 32, c:c + 32].to(torch.uint8)
        assert torch.equal(got[i], want.flip(-1) if flip and mirror >= 0.5 else want)


def test_without_crop_and_flip_training_sees_what_scoring_sees(tmp_path):
    make_tree(tmp_path, splits=("",), size=(50, 90))
    for s in (erpm.open_set(f"folder:{tmp_path}", erpm.Data(size_px=32)), shown()):
        keys = [(0, k) for k in range(8)]
        plain = s.__getitems__(keys)[0]
        assert torch.equal(s.training(0, False, False).__getitems__(keys)[0], plain)
        for x, y in zip(s.training(0, False, True).__getitems__(keys)[0], plain):
            assert torch.equal(x, y) or torch.equal(x, y.flip(-1))
        assert not torch.equal(s.training(0, False, True).__getitems__(keys)[0], plain)
        assert not torch.equal(s.training(0, True, False).__getitems__(keys)[0], plain)


def test_fit_crop_cuts_the_centre_out_and_squash_cuts_nothing_off(tmp_path):
    make_tree(tmp_path, n=1, splits=("",), size=(40, 80))
    picture, got = Image.open(tmp_path / "cat/0.png"), {}
    for fit in ("", "crop", "squash"):
        for view in (erpm.View(64, 0.8, "bicubic"), erpm.View(64, 0.8, "bicubic", True)):
            s = erpm.open_set(f"folder:{tmp_path}", erpm.Data(size_px=32, fit=fit), view=view)
            assert s.view.squash == {"crop": False, "squash": True, "": view.squash}[fit]
            got[s.view.squash] = s.__getitems__([(0, 0)])[0][0].permute(1, 2, 0).numpy()
    want = {False: picture.resize((80, 40), Image.BICUBIC).crop((24, 4, 56, 36)),
            True: picture.resize((32, 32), Image.BICUBIC)}
    assert all(np.array_equal(got[k], np.asarray(want[k])) for k in want)


def test_orders_are_permutations_that_a_restart_repeats(monkeypatch):
    def take(start, k):
        it = iter(erpm.Batches(105, 10, seed=5, start=start))
        return [next(it) for _ in range(k)]
    whole = take(0, 25)
    assert len({i for b in whole[:10] for _, i in b}) == 100
    assert take(13, 12) == whole[13:] and [e for e, _ in whole[20]] == [2] * 10
    shares = []
    for rank in range(3):                            # every process takes its part of each batch
        monkeypatch.setattr(erpm, "world", lambda: (rank, 3))
        shares.append(take(0, 25))
    assert [sum(parts, []) for parts in zip(*shares)] == whole
    with refuses("9 training images are fewer than a batch of 10"):
        erpm.Batches(9, 10, 0)


def test_the_number_of_workers_changes_no_sample(tmp_path):
    make_tree(tmp_path)
    s = erpm.open_set(f"folder:{tmp_path}", erpm.Data(size_px=32), "train").training(seed=1)
    got = []
    for workers in (0, 2):
        it = iter(erpm.loader(s, workers, batch_sampler=erpm.Batches(len(s), 4, seed=0)))
        got.append(torch.cat([next(it)[0] for _ in range(4)]))
    assert torch.equal(*got)


def test_a_smaller_subset_is_part_of_a_larger_one():
    s = erpm.open_set("shapes", erpm.Data(n_test=300))
    some, few = s.subset(100), s.subset(20)
    assert np.array_equal(some.subset(20).index, few.index) and set(few.index) < set(some.index)
    x, y, index = few.__getitems__([(0, 3)])
    assert torch.equal(x[0], s.images[index[0]]) and y[0] == s.y[index[0]]


def test_folder_sets_read_train_and_val_and_take_a_label(tmp_path):
    make_tree(tmp_path)
    make_tree(tmp_path / "flat", ("owl", "ant", ".git"), n=2, splits=("",))
    (tmp_path / "flat/owl/._0.png").write_bytes(b"no picture")
    (tmp_path / "flat/notes.txt").write_text("x")
    for split, n in (("train", 12), ("test", 12)):
        s = erpm.open_set(f"folder:{tmp_path}", erpm.Data(size_px=32), split)
        assert (len(s), s.classes, s.name) == (n, ("cat", "dog"), f"folder:{tmp_path}")
    x, y, index = s.__getitems__([(0, 0), (0, 11)])
    assert x.shape == (2, 3, 32, 32) and y.tolist() == [0, 1] and index.tolist() == [0, 11]
    s = erpm.open_set(f"birds@folder:{tmp_path}/flat")
    assert (s.name, s.classes, s.y.tolist()) == ("birds", ("ant", "owl"), [0, 0, 1, 1])
    s = erpm.open_set(f"birds@folder-c:{tmp_path}/flat")
    assert s.corrupted and s.name == "birds-c" and len(erpm.cells(s)) == 75


@pytest.mark.parametrize("name, says", [
    ("folder:none", "no folder none/val"), ("folder:one", "two classes or more, found 1"),
    ("folder:empty", "without images ['dog']"), ("folder-c:none", "no folder none/val"),
    ("folder:half", "no folder half/val"), ("folder:two/train/cat/0.png", "no folder"),
    ("shapes-d", "unknown set 'shapes-d'; did you mean 'shapes"), ("a@shapes", "unknown set"),
])
def test_a_folder_that_is_no_set_says_what_is_wanted(here, name, says):
    make_tree(here / "one", ("cat",), splits=("",))
    make_tree(here / "half", splits=("train",))
    make_tree(here / "two")
    make_tree(here / "empty", splits=("",))
    shutil.rmtree(here / "empty/dog")
    (here / "empty/dog").mkdir()
    with refuses(says):
        erpm.open_set(name)
    with refuses("has no training split"):
        erpm.open_set("folder-c:two", split="train")


def test_a_broken_picture_is_named(tmp_path):
    path = tmp_path / "x.png"
    make_tree(tmp_path / "t", n=1, splits=("",), size=(300, 300))
    whole = (tmp_path / "t/cat/0.png").read_bytes()
    for data in (b"", b"no picture", whole[:len(whole) // 2]):
        path.write_bytes(data)
        with refuses(f"cannot read the image {path}"):
            erpm.read_picture(path)
    assert erpm.read_picture(tmp_path / "t/cat/0.png", 2).size == (296, 296)


def test_images_come_as_tensors_a_loader_or_any_data_set():
    x, y = images(10), torch.arange(10) % 3
    pairs = TensorDataset(x / 255, y)
    for given in ((x, y), [x, y.tolist()], (x / 255, y), (x, y.numpy()), pairs,
                  DataLoader(pairs, 4), list(zip(x, y.tolist()))):
        s = erpm.as_images(given)
        assert torch.equal(s.images, x) and s.y.tolist() == y.tolist() and len(s.classes) == 3
        assert s.__getitems__([(0, 3)])[0].dtype == torch.uint8 and s.view.size_px == 32
    assert erpm.as_images(s) is s


@pytest.mark.parametrize("given", [
    (images(4) / 255 * 2, [0] * 4), (images(4), [0] * 3), (images(4)[..., :9], [0] * 4),
    (images(4)[:, :1], [0] * 4), (images(4)[0], [0] * 3), (images(4).int(), [0] * 4), [],
    (images(0), [])], ids=range(8))
def test_images_of_another_form_are_one_clear_line(given):
    with refuses("images: expected uint8 (n,3,S,S), or floats in [0, 1], and n labels"):
        erpm.as_images(given)


# ==== sets ====

def colour(k):
    """The colour that stands for ImageNet class k: its three decimal digits."""
    return tuple(25 * (k // d % 10) + 12 for d in (100, 10, 1))


def encoded(k, kind="JPEG", size=(20, 14), frame=0):
    """The file of a picture in class k's colour, with a red frame of `frame` px."""
    picture = ImageOps.expand(Image.new("RGB", size, colour(k)), frame, (255, 0, 0))
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def put_files(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def colour_net(x):
    """Reads the class off the picture.  Every fifth class is answered louder by another one."""
    middle = x[:, :, x.shape[2] // 2, x.shape[3] // 2].long() // 25
    k = (middle * torch.tensor([100, 10, 1])).sum(1)
    z = torch.zeros(len(x), 1000).scatter_(1, k[:, None], 2.0)
    louder = torch.where(k % 5 == 0, (k * 37 + 11) % 1000, k)
    return z.scatter_(1, louder[:, None], torch.where(k % 5 == 0, 3.0, 2.0)[:, None])


def mini_imagenet(root):
    """Every set of the ImageNet family in miniature below `root`: about 4,500 solid pictures whose
    colour tells the class."""
    names = erpm.synsets()
    jpeg, place = [encoded(k) for k in range(1000)], {s: k for k, s in enumerate(names)}
    for k, s in enumerate(names):
        put_files(root, {f"imagenet/val/{s}/ILSVRC2012_val_{i:08d}.JPEG": jpeg[k]
                         for i in range(1 + k % 2)}
                  | {f"sketch/{s}/sketch_0.{'JPG' if k % 2 else 'JPEG'}": jpeg[k],
                     f"imagenetv2-matched-frequency-format-val/{k}/a.jpeg": jpeg[k]})
    for part in "ar":
        for i, s in enumerate(erpm.synsets(part)):
            put_files(root, {f"imagenet-{part}/{s}/{n}.jpg": jpeg[place[s]]
                             for n in range(1 + i % 2)})
    for folder, ids in erpm.OBJECTNET.items():
        put_files(root, {f"objectnet-1.0/images/{folder}/{i}.png": encoded(i, "PNG", (30, 40), 2)
                         for i in ids})
    for c, s in erpm.cells(erpm.ImageSet("", [], [], corrupted=True)):
        put_files(root, {f"imagenet-c/{c}/{s}/{names[k]}/0.JPEG": jpeg[k]
                         for k in (3, 10, 500, 999)})
    put_files(root, {"objectnet-1.0/images/air_freshener/0.png": encoded(0, "PNG", frame=2),
                     "imagenet/val/__MACOSX/._x.JPEG": b"no picture", "imagenet-a/.DS_Store": b"",
                     "imagenet-a/README.txt": b"",
                     f"imagenet-r/{erpm.synsets('r')[0]}/._0.jpg": b"no picture"})
    return root


def slow_count(files, groups):
    """(n, correct) of colour_net, by the obvious loop: files (path, class number in `groups`),
    groups: the network's outputs of each class."""
    correct = 0
    for path, y in files:
        im = Image.open(path).convert("RGB")
        middle = im.getpixel((im.width // 2, im.height // 2))
        k = sum(c // 25 * d for c, d in zip(middle, (100, 10, 1)))
        score = {k: 2.0} | ({(k * 37 + 11) % 1000: 3.0} if k % 5 == 0 else {})
        best = [max(score.get(i, 0.0) for i in ids) for ids in groups]
        correct += best.index(max(best)) == y
    return len(files), correct


def slow_set(root, name):
    """(files, groups) of a miniature set, for slow_count, with none of erpm's code but the class
    lists."""
    names = list(erpm.synsets())
    groups = {"a": [[names.index(s)] for s in erpm.synsets("a")],
              "r": [[names.index(s)] for s in erpm.synsets("r")],
              "objectnet": list(erpm.OBJECTNET.values())}
    own = groups.get(re.split("[@-]", name)[-1], [[k] for k in range(1000)])
    base = name.partition("@")[0]
    folder = {"imagenet": "imagenet/val", "imagenet-sketch": "sketch",
              "imagenet-v2": "imagenetv2-matched-frequency-format-val",
              "objectnet": "objectnet-1.0/images"}.get(base, base)
    files = []
    for path in sorted((root / folder).glob("*/[!.]*")):
        where = path.parent.name
        if name == "objectnet":
            files += [(path, list(erpm.OBJECTNET).index(where))] if where in erpm.OBJECTNET else []
            continue
        k = int(where) if base == "imagenet-v2" else names.index(where)
        files += [(path, y) for y, ids in enumerate(own) if k in ids]
    return files, own


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return mini_imagenet(tmp_path_factory.mktemp("mini"))


def partial_data(root, **more):
    return erpm.Data(root=str(root), allow_partial=True, **{"size_px": 32} | more)


MINI_SETS = {"imagenet": 1500, "imagenet-v2": 1000, "imagenet-a": 300, "imagenet-r": 300,
             "imagenet-sketch": 1000, "objectnet": 125, "imagenet@a": None, "imagenet@r": None,
             "imagenet@objectnet": None}


def mini_figures(root):
    """Figures of colour_net on every miniature set, and on a cell of ImageNet-C's files."""
    data = partial_data(root)
    sets = {name: erpm.open_set(name, data) for name in MINI_SETS}
    sets["imagenet-c"] = erpm.open_cell("imagenet", data, "fog", 3)
    return {name: erpm.evaluate(colour_net, s, batch=64) for name, s in sets.items()}


@pytest.fixture(scope="module")
def one_process(mini):
    return mini_figures(mini)


@pytest.mark.parametrize("name, n", MINI_SETS.items())
def test_every_set_of_the_miniature_imagenet_scores_as_a_slow_count_does(mini, one_process, name,
                                                                         n):
    s, got, row = erpm.open_set(name, partial_data(mini)), one_process[name], erpm.SETS[name]
    files, groups = slow_set(mini, name)
    want = slow_count(files, groups)
    assert (got["n"], got["correct"]) == want and len(s) == len(files)
    assert n in (None, want[0]) and 0 < want[1] < want[0]
    assert len(s.classes) == len(groups) == row.n_classes and len(s.outputs) == 1000
    assert s.name == f"{name} ({len(files):,} of {row.n_test:,} images)"
    assert "@" not in name or row.n_test == 50 * sum(map(len, groups))


@pytest.mark.parametrize("n", [2, 3])
def test_any_number_of_processes_counts_the_miniature_imagenet_alike(mini, one_process, tmp_path,
                                                                     n):
    def work(rank):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=rank,
                                world_size=n)
        (tmp_path / f"{rank}.json").write_text(json.dumps(mini_figures(mini)))
        dist.destroy_process_group()

    fork_all(n, work)
    assert all(json.loads((tmp_path / f"{rank}.json").read_text()) == one_process
               for rank in range(n))


def test_objectnet_has_113_classes_125_outputs_and_no_red_frame(mini):
    ids = [i for many in erpm.OBJECTNET.values() for i in many]
    assert (len(erpm.OBJECTNET), len(ids), len(set(ids))) == (113, 125, 125)
    assert list(erpm.OBJECTNET) == sorted(erpm.OBJECTNET)
    for name in ("objectnet", "objectnet-c"):
        s = erpm.open_set(name, partial_data(mini), view=erpm.View(32, 1.0, squash=True))
        x, y, index = s.__getitems__([(0, p) for p in range(0, 125, 6)])
        want = torch.tensor([colour(int(Path(s.paths[i]).stem)) for i in index])
        assert torch.equal(x, want[:, :, None, None].to(torch.uint8).expand_as(x))
    assert s.corrupted and s.own_view and s.view == erpm.View()


def test_imagenet_c_is_read_from_disk_cell_by_cell(mini):
    data = partial_data(mini, size_px=0)
    s = erpm.open_set("imagenet-c", data, view=erpm.View(288, 0.9, "bicubic"))
    assert (s.view, len(s), s.archive) == (erpm.View(224, 1.0), 4, mini / "imagenet-c")
    assert s.name == "imagenet-c (4 of 50,000 images)"
    for cell in erpm.cells(s):
        some = erpm.open_cell("imagenet", data, *cell)
        assert some.y.tolist() == [3, 10, 500, 999]
        assert all(f"/{cell[0]}/{cell[1]}/" in p for p in some.paths)
    assert erpm.evaluate(colour_net, some)["correct"] == 2          # 10 and 500 are drowned out
    few = erpm.open_cell("imagenet", dataclasses.replace(data, n_test=2), *cell)
    assert np.array_equal(few.index, s.subset(2).index)
    with refuses("imagenet-c: 4 images in "):
        erpm.open_set("imagenet-c", erpm.Data(root=str(mini)))


def test_a_224_px_file_of_imagenet_c_is_not_touched_and_groups_are_found(tmp_path):
    file = tmp_path / "imagenet-c/weather/fog/3/n01440764/1.JPEG"         # as the tars have it
    file.parent.mkdir(parents=True)
    Image.fromarray(images(1, 224)[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=85)
    s = erpm.open_cell("imagenet", partial_data(tmp_path), "fog", 3)
    want = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    assert torch.equal(s.__getitems__([(0, 0)])[0][0], want)
    for cell in (("fog", 2), ("snow", 3)):
        with refuses(f"lacks the cell {cell[0]}/{cell[1]}"):
            erpm.open_cell("imagenet", partial_data(tmp_path), *cell)


def test_without_an_archive_cells_are_made_from_the_benchmarks_own_view(mini, tmp_path):
    (tmp_path / "imagenet").symlink_to(mini / "imagenet")
    view = erpm.View(336, 1.0, "bicubic", squash=True)
    s = erpm.open_set("imagenet-c", partial_data(tmp_path, fit="squash"), view=view)
    assert s.view == erpm.View(224, 0.875, "bilinear") and s.own_view and not s.archive
    assert s.name == "imagenet-c (regenerated, 1,500 of 50,000 images)"
    clean = erpm.open_set("imagenet", partial_data(tmp_path, size_px=0), view=view)
    assert clean.view == view and not clean.own_view


def small_row(monkeypatch, name, **changes):
    monkeypatch.setitem(erpm.SETS, name, dataclasses.replace(erpm.SETS[name], **changes))


def test_a_half_unpacked_set_is_refused_with_both_counts(mini, monkeypatch):
    data = erpm.Data(root=str(mini), size_px=32)
    for name, n in (("imagenet", "50,000"), ("imagenet@a", "10,000"), ("imagenet-c", "50,000")):
        with pytest.raises(erpm.UserError, match=f"^{name}: .* images in .*, expected {n}"):
            erpm.open_set(name, data)
    small_row(monkeypatch, "imagenet", n_test=1500)
    assert erpm.open_set("imagenet", data).name == "imagenet"
    small_row(monkeypatch, "imagenet", n_test=1499)          # more than published are no set either
    with refuses("imagenet: 1,500 images in "):
        erpm.open_set("imagenet", data)


def test_tiny_imagenet_is_read_as_published(tmp_path, monkeypatch):
    small_row(monkeypatch, "tiny-imagenet", n_train=4, n_test=3, n_classes=2)
    top, wnids = tmp_path / "tiny-imagenet-200", ("n02124075", "n01443537")   # not in text order
    of = dict(zip(("val_0.JPEG", "val_1.JPEG", "val_2.JPEG"), (wnids[0], wnids[1], wnids[0])))
    put_files(top, {"wnids.txt": "\n".join(wnids), "test/images/test_0.JPEG": encoded(0)}
              | {f"train/{w}/images/{w}_{i}.JPEG": encoded(1) for w in wnids for i in (0, 1)}
              | {f"val/images/{n}": encoded(2, size=(64, 64)) for n in of}
              | {"val/val_annotations.txt": "".join(f"{n}\t{w}\t0\t32\t44\t62\n"
                                                    for n, w in of.items())})
    s = erpm.open_set("tiny-imagenet", erpm.Data(root=str(tmp_path)), view=erpm.View(224))
    assert s.classes == tuple(sorted(wnids)) and s.view == erpm.View(64, 1.0) and s.own_view
    assert {Path(p).name: s.classes[y] for p, y in zip(s.paths, s.y)} == of
    train = erpm.open_set("tiny-imagenet", erpm.Data(root=str(tmp_path)), "train")
    assert train.y.tolist() == [0, 0, 1, 1]
    want = torch.from_numpy(np.array(Image.open(s.paths[0]))).permute(2, 0, 1)
    assert torch.equal(s.__getitems__([(0, 0)])[0][0], want)


def test_tiny_imagenet_c_and_cifar_c_are_read_from_disk(tmp_path, monkeypatch):
    small_row(monkeypatch, "tiny-imagenet", n_test=2, n_classes=2)
    small_row(monkeypatch, "cifar10", n_test=4)
    rng, data = np.random.default_rng(0), erpm.Data(root=str(tmp_path))
    folder, y = tmp_path / "CIFAR-10-C", np.tile(np.array([3, 8, 8, 0], np.uint8), 5)
    folder.mkdir()
    np.save(folder / "labels.npy", y)
    arrays = {c: rng.integers(0, 256, (20, 32, 32, 3), np.uint8) for c in erpm.CORRUPTIONS}
    for c in arrays:
        np.save(folder / f"{c}.npy", arrays[c])
    for c, s in (("fog", 1), ("jpeg_compression", 5)):
        some = erpm.open_cell("cifar10", data, c, s)
        x = some.__getitems__([(0, p) for p in range(4)])[0]
        assert some.y.tolist() == [3, 8, 8, 0] and some.name == "cifar10-c"
        assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), arrays[c][4 * s - 4:4 * s])
    assert erpm.evaluate(lambda x: F.one_hot(x[:, 0, 0, 0].long(), 256), some)["n"] == 4
    np.save(folder / "labels.npy", y[:-1])
    with refuses("expected 4"):
        erpm.open_set("cifar10-c", data)
    (folder / "fog.npy").write_bytes(b"no array")
    with refuses("fog.npy"):
        erpm.open_cell("cifar10", data, "fog", 1)
    put_files(tmp_path / "Tiny-ImageNet-C/snow/4", {
        "n02124075/a.JPEG": encoded(4, size=(64, 64)), "n01443537/b.JPEG": encoded(9)})
    some = erpm.open_cell("tiny-imagenet", data, "snow", 4)
    assert [Path(p).name for p in some.paths] == ["b.JPEG", "a.JPEG"] and some.view.size_px == 64


@pytest.mark.parametrize("name, cls, n_train", [
    ("flowers102", "Flowers102", 5), ("cifar10", "CIFAR10", 3),
    ("fashion-mnist", "FashionMNIST", 3)])
def test_sets_by_torchvision_are_read_through_its_classes(name, cls, n_train, tmp_path,
                                                          monkeypatch):
    class Fake:
        classes = [f"flower {k}" for k in range(102)]

        def __init__(self, root, split="", train=True, download=False):
            n = {"train": 3, "val": 2, "test": 4}[split or ("train" if train else "test")]
            self._image_files, self._labels, self.targets = [Path("x")] * n, [7] * n, [1] * n
            self.data = np.full((n, 32, 32, 3), n, np.uint8) if name == "cifar10" else \
                torch.full((n, 28, 28), n, dtype=torch.uint8)

    data = erpm.Data(root=str(tmp_path))
    with pytest.raises(erpm.Absent, match="download=True"):
        erpm.open_set(name, data)
    (tmp_path / erpm.SETS[name].test).mkdir(parents=True)
    with refuses(erpm.SETS[name].test):
        erpm.open_set(name, data)
    monkeypatch.setattr(erpm.torchvision.datasets, cls, Fake)
    small_row(monkeypatch, name, n_classes=102, n_train=n_train, n_test=4)
    test, train = (erpm.open_set(name, data, s) for s in ("test", "train"))
    assert (len(test), len(train)) == (4, n_train)
    if name != "flowers102":
        x = test.__getitems__([(0, 0)])[0]
        assert x.shape == (1, 3, 32, 32) and x[0, 0, 16, 16] == 4
        assert x[0, 0, 0, 0] == (4 if name == "cifar10" else 0)


def test_sun397_and_places205_go_by_their_lists_and_inaturalist_by_its_folders(tmp_path,
                                                                               monkeypatch):
    small_row(monkeypatch, "sun397", n_train=1, n_test=2, n_classes=2)
    small_row(monkeypatch, "places205", n_train=1, n_test=3, n_classes=2)
    small_row(monkeypatch, "inaturalist2021", n_train=2, n_test=2, n_classes=2)
    deep = "places205/data/vision/torralba/deeplearning/images256/"
    lists = "places205/trainvalsplit_places205/"
    put_files(tmp_path, {
        "SUN397/ClassName.txt": "/a/abbey\n/a/apse/indoor\n",
        "SUN397/Training_01.txt": "/a/abbey/sun_1.jpg\n",
        "SUN397/Testing_01.txt": "/a/apse/indoor/sun_2.jpg\r\n/a/abbey/sun_3.jpg\r\n",
        f"{lists}train_places205.csv": "y/yard/gsun_1.jpg 1\n",
        f"{lists}val_places205.csv":
            "y/yard/gsun_2.jpg 1\na/abbey/gsun_3.jpg 0\na/abbey/gsun_4.jpg 0\n",
        f"{deep}y/yard/gsun_2.jpg": encoded(3)}
        | {f"{half}/{c}/1.jpg": encoded(1) for c in "ab" for half in ("2021_train_mini",
                                                                     "2021_valid")})
    both = lambda name: [erpm.open_set(name, erpm.Data(root=str(tmp_path)), s)      # noqa: E731
                         for s in ("test", "train")]
    test, train = both("sun397")
    assert test.classes == ("abbey", "apse/indoor") and test.y.tolist() == [1, 0]
    assert train.paths == [str(tmp_path / "SUN397/a/abbey/sun_1.jpg")]
    test, train = both("places205")
    put_files(tmp_path / lists, {"train_places205.csv": "y/yard/gsun_1.jpg\n"})
    with refuses("train_places205.csv"):
        both("places205")
    assert test.classes == train.classes == ("abbey", "yard") and test.y.tolist() == [1, 0, 0]
    assert train.y.tolist() == [1] and train.paths[0].endswith("y/yard/gsun_1.jpg")
    assert test.__getitems__([(0, 0)])[0].shape == (1, 3, 224, 224)
    assert [s.y.tolist() for s in both("inaturalist2021")] == [[0, 1], [0, 1]]
    small_row(monkeypatch, "inaturalist2021", n_classes=3)
    with refuses("2 classes in "):
        both("inaturalist2021")


def test_sets_lists_every_set_and_its_faults(here):
    put_files(here / "data", {"imagenet-a/n01498041/x.jpg": encoded(1), "sketch/x.txt": b""})
    make_tree(here / "mine", n=2, splits=("",))
    out = runs("sets", "--set", "pets@folder:mine")
    assert all(f"{name} " in out for name in (*erpm.SETS, "imagenet-c", "pets@folder:mine"))
    line = next(t for t in out.splitlines() if t.strip("| ").startswith("pets@folder"))
    assert [w.strip() for w in line.strip("| ").split("|")][1:5] == ["4", "any", "2", "mine"]
    assert not (here / "runs").exists() and "Traceback" not in out


# ==== corruptions ====

# What the reference (make_imagenet_c.py with ImageMagick, OpenCV, scikit-image) makes of picture():
# severities 1..5: (PSNR to the clean picture in dB, mean step between horizontal neighbours, mean).
REFERENCE = {
    "gaussian_noise": ((22.59, 21.32, 153), (19.21, 30.55, 152), (15.97, 43.43, 151),
                       (13.19, 58.72, 149), (10.67, 77.09, 146)),
    "shot_noise": ((21.14, 24.02, 152), (17.51, 35.49, 149), (14.61, 48.62, 146),
                   (11.33, 69.14, 139), (9.48, 83.11, 133)),
    "impulse_noise": ((19.66, 12.12, 155), (16.78, 18.91, 154), (14.98, 25.87, 153),
                      (12.22, 42.81, 151), (10.19, 62.38, 148)),
    "defocus_blur": ((28.02, 3.96, 155), (26.30, 3.68, 155), (23.49, 3.14, 155),
                     (21.47, 2.65, 156), (19.71, 2.21, 156)),
    "glass_blur": ((25.11, 4.37, 154), (25.44, 4.13, 154), (20.23, 4.13, 153), (21.25, 3.88, 154),
                   (20.24, 3.14, 154)),
    "motion_blur": ((23.45, 4.08, 156), (20.47, 3.65, 157), (18.14, 3.19, 158), (16.59, 2.70, 160),
                    (15.79, 2.37, 161)),
    "zoom_blur": ((18.13, 3.19, 156), (17.04, 2.86, 156), (16.77, 2.59, 156), (16.25, 2.42, 156),
                  (16.01, 2.25, 156)),
    "snow": ((16.62, 7.16, 186), (12.52, 10.37, 204), (12.50, 7.88, 204), (10.93, 7.75, 213),
             (9.81, 7.96, 223)),
    "frost": ((13.82, 5.23, 200), (12.20, 6.07, 208), (11.68, 6.74, 208), (11.89, 7.26, 206),
              (11.82, 7.94, 203)),
    "fog": ((13.18, 2.07, 137), (12.30, 1.80, 137), (11.47, 1.69, 134), (11.47, 1.87, 134),
            (11.09, 2.23, 134)),
    "brightness": ((22.91, 4.47, 171), (17.16, 4.16, 185), (14.01, 3.77, 197), (12.00, 3.20, 207),
                   (10.65, 2.65, 214)),
    "contrast": ((14.90, 1.89, 155), (13.56, 1.42, 155), (12.42, 0.95, 155), (11.39, 0.47, 155),
                 (10.92, 0.24, 155)),
    "elastic_transform": ((11.82, 4.55, 155), (10.27, 5.23, 158), (18.19, 4.64, 155),
                          (17.78, 4.82, 155), (17.40, 5.37, 155)),
    "pixelate": ((31.87, 4.51, 156), (29.79, 4.43, 156), (26.30, 4.24, 156), (25.02, 4.10, 156),
                 (24.82, 3.96, 156)),
    "jpeg_compression": ((33.40, 5.15, 155), (32.03, 5.27, 155), (31.07, 5.37, 155),
                         (29.14, 5.59, 155), (27.31, 5.67, 155)),
}


FIXED = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")


def picture(side=224):
    """uint8 (3,side,side): gradients, rings, stripes and blocks; the same on every machine."""
    v, u = np.mgrid[0:side, 0:side] / side
    r = np.hypot(u - 0.4, v - 0.6)
    g = 0.5 + 0.3 * np.sin(60 * r * r + 2 * u) + 0.2 * (r < 0.2) - 0.2 * (np.abs(u - v) < 0.05)
    g = g + 0.15 * ((16 * u).astype(int) + (16 * v).astype(int)) % 2 * (u > 0.6)
    rgb = np.stack([g * (0.6 + 0.4 * u), g * (0.9 - 0.3 * v), 0.8 * g + 0.15 * v])
    return torch.from_numpy((np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8))


def photos(n, h, w):
    """uint8 (n,3,h,w): smooth random pictures."""
    z = torch.randn(n, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    z = F.interpolate(z, size=(h, w), mode="bicubic", align_corners=True)
    return (z * 60 + 128).clamp(0, 255).to(torch.uint8)


def measure(x, y):
    """(PSNR, mean horizontal step, mean) averaged over the images y (B,3,H,W)."""
    x, y = x.double(), y.double()
    psnr = 10 * torch.log10(255 ** 2 / (y - x).square().mean((1, 2, 3)))
    return psnr.mean().item(), y.diff(dim=3).abs().mean().item(), y.mean().item()


@pytest.mark.parametrize("name", erpm.CORRUPTIONS)
def test_every_severity_has_the_statistics_of_the_reference(name):
    n = 1 if name in FIXED else 64 if name in ("frost", "fog", "elastic_transform") else 12
    x = picture().expand(n, -1, -1, -1)
    near, bias = (0.1, 0.6) if n == 1 else (0.6, 1) if n == 12 else (0.6, 10)
    for severity, (psnr, step, mean) in enumerate(REFERENCE[name], 1):
        got = measure(x, erpm.corrupt(x, name, severity))
        assert abs(got[0] - psnr) < near and abs(got[2] - mean) < bias, (severity, got)
        assert abs(got[1] / step - 1) < (0.02 if n == 1 else 0.1), (severity, got)


@pytest.mark.parametrize("name", erpm.CORRUPTIONS)
def test_an_image_does_not_depend_on_its_batch_or_its_layout(name):
    for h, w in ((32, 32), (40, 33), (64, 80), (224, 200)):
        x, some = photos(90 if h < 200 else 6, h, w), [5, 1, 4]
        whole = erpm.corrupt(x, name, 3)
        assert torch.equal(whole, erpm.corrupt(x, name, 3)) and whole.shape == x.shape
        assert torch.equal(whole[some], erpm.corrupt(x[some], name, 3, index=some))
        assert torch.equal(whole[-1:], erpm.corrupt(x[-1:], name, 3, index=[len(x) - 1]))
        lying = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(whole, erpm.corrupt(lying, name, 3))


@pytest.mark.parametrize("name", erpm.CORRUPTIONS)
def test_seed_index_and_severity_change_the_draw(name):
    x = photos(1, 64, 64).expand(3, -1, -1, -1)
    a, b = erpm.corrupt(x, name, 3), erpm.corrupt(x, name, 3, seed=1)
    assert torch.equal(a[0], a[1]) == torch.equal(a, b) == (name in FIXED)
    b, c = (erpm.corrupt(x[:1], name, 3, seed=s) for s in (7, np.int64(7)))
    assert torch.equal(b, c)


@pytest.mark.parametrize("side", (32, 64, 224))
def test_error_grows_with_severity(side):
    x = photos(24 if side < 200 else 6, side, side)
    for name in ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "zoom_blur",
                 "brightness", "contrast", "jpeg_compression"):
        error = [measure(x, erpm.corrupt(x, name, s))[0] for s in range(1, 6)]
        assert all(a > b - 0.15 for a, b in zip(error, error[1:])) and error[0] > error[4], name


def test_the_15_have_two_columns_of_constants_that_go_by_the_longer_side():
    assert list(erpm.CORRUPTIONS) == list(REFERENCE)
    for size, c in (((64, 40), 0.75), ((40, 65), 0.4)):
        x = photos(1, *size)
        assert torch.equal(erpm.corrupt(x, "contrast", 1), erpm.contrast(x, c, None))
    assert all(len(r) == 3 and len(r[1]) == len(r[2]) == 5 for r in erpm.RECIPES.values())


@pytest.mark.parametrize("size", ((32, 512), (512, 300), (225, 299)))
def test_every_size_works(size):
    x = photos(1, *size)
    for name in erpm.CORRUPTIONS:
        assert erpm.corrupt(x, name, 2).shape == x.shape
        assert erpm.corrupt(x[:0], name, 1).shape == (0, 3, *size)


ONE = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)


@pytest.mark.parametrize("x, name, severity, index, words", [
    (ONE / 1, "fog", 1, None, "uint8.*float32"), (ONE.numpy(), "fog", 1, None, "tensor.*ndarray"),
    (ONE[0], "fog", 1, None, r"\(B,3,H,W\).*\(3, 32, 32\)"),
    (ONE[:, :, 1:], "fog", 1, None, r"32 to 512.*\(1, 3, 31, 32\)"),
    (ONE[..., :1].expand(-1, -1, -1, 513), "fog", 1, None, "32 to 512.*32, 513"),
    (ONE, "fogg", 1, None, "did you mean 'fog'.*jpeg_compression"),
    (ONE, "fog", 0, None, "1, 2, 3, 4 or 5, got 0"), (ONE, "fog", 2.5, None, "got 2.5"),
    (ONE, "fog", 1, [1, 2], "1 images but 2 indices")])
def test_bad_input_is_one_clear_error(x, name, severity, index, words):
    with pytest.raises(erpm.UserError, match=words):
        erpm.corrupt(x, name, severity, index=index)


def test_jpeg_and_the_published_round_trip_equal_pillow():
    x = photos(2, 224, 224)
    for quality, x, ours in (
            (15, x, erpm.corrupt(x, "jpeg_compression", 3)),
            (85, erpm.corrupt(x, "contrast", 1), erpm.corrupt(x, "contrast", 1, jpeg=True))):
        for a, b in zip(x, ours):
            file = io.BytesIO()
            Image.fromarray(a.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
            assert np.array_equal(np.asarray(Image.open(file)), b.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("h, w", ((32, 32), (64, 64), (224, 224), (200, 301)))
def test_pixelate_equals_pillow(h, w):
    x = photos(1, h, w)
    for severity, c in enumerate(erpm.RECIPES["pixelate"][2 if max(h, w) <= 64 else 1], 1):
        pil = Image.fromarray(x[0].permute(1, 2, 0).numpy())
        pil = pil.resize((int(w * c), int(h * c)), Image.BOX).resize((w, h), Image.BOX)
        ours = erpm.corrupt(x, "pixelate", severity)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(pil), ours)


@pytest.mark.parametrize("d, passes", ((1, 2), (2, 3), (4, 2)))
def test_glass_blur_is_the_loop_that_copies(d, passes):
    x, h, w = photos(1, 36, 41), 36, 41
    # a sigma that blurs nothing
    ours = erpm.glass_blur(x, (0.05, d, passes), [erpm.rng("glass")])[0]
    g, y = erpm.rng("glass"), x[0].permute(1, 2, 0).numpy().copy()
    for _ in range(passes):
        pick = erpm.draw([g], (h, w), torch.Tensor.random_, 0, 4 * d * d, dtype=torch.int32)
        pick = pick[0].numpy()
        for i in range(h - d, d, -1):
            for j in range(w - d, d, -1):
                dy, dx = divmod(int(pick[i, j]), 2 * d)
                y[i, j] = y[i + dy - d, j + dx - d]
    assert np.array_equal(y, ours.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("angle", (-135, -60.5, -45, 0, 13.7, 45))
def test_motion_is_the_loop_over_taps(angle):
    x, radius, sigma = photos(1, 34, 37), 6, 2.5
    ours = erpm.motion(x, radius, sigma, [angle])[0].numpy()
    taps = np.exp(-np.arange(2 * radius + 1) ** 2 / (2 * sigma ** 2))
    want, rad = np.zeros((3, 34, 37)), math.radians(angle)
    for i, t in enumerate(taps / taps.sum()):
        v = np.arange(34) + math.ceil(i * math.sin(rad) - 0.5)
        u = np.arange(37) + math.ceil(i * math.cos(rad) - 0.5)
        want += t * x[0].numpy()[:, v.clip(0, 33)][:, :, u.clip(0, 36)]
    assert np.abs(ours - want).max() < 1e-3


def test_zoom_blur_is_the_mean_of_the_zooms():
    x = photos(1, 60, 50)
    want, factors = x.double(), np.arange(1, 1.16, 0.01)
    for z in factors:
        ch, cw = math.ceil(60 / z), math.ceil(50 / z)
        crop = x[:, :, (60 - ch) // 2:, (50 - cw) // 2:][:, :, :ch, :cw].double()
        size = (round(ch * z), round(cw * z))
        big = F.interpolate(crop, size=size, mode="bilinear", align_corners=True)
        want = want + big[:, :, (size[0] - 60) // 2:, (size[1] - 50) // 2:][:, :, :60, :50]
    diff = erpm.corrupt(x, "zoom_blur", 3).double() - want / (len(factors) + 1)
    assert -1.001 < diff.min() and diff.max() < 0.01


def test_defocus_is_a_plain_convolution():
    x, (radius, sigma) = photos(1, 140, 130), (6, 0.5)
    g = np.arange(-8, 9)
    k = (g[:, None] ** 2 + g ** 2 <= radius ** 2) / 113  # 113 pixels within radius 6
    t = np.exp(-0.5 * (np.arange(-1, 2) / sigma) ** 2)
    k = np.pad(k, 1)
    k = sum(t[i] * t[j] * k[i:i + 17, j:j + 17] for i in range(3) for j in range(3)) / t.sum() ** 2
    y = F.pad(x.double(), (8,) * 4, mode="reflect").transpose(0, 1)
    want = F.conv2d(y, torch.from_numpy(k)[None, None]).transpose(0, 1)
    diff = erpm.corrupt(x, "defocus_blur", 3).double() - want
    assert -1.001 < diff.min() and diff.max() < 0.01


def test_brightness_is_hsv():
    import colorsys
    x = photos(1, 32, 32)
    x[..., :4] = x[:, :1, :, :4]  # greys
    x[..., 0] = 0
    ours = erpm.corrupt(x, "brightness", 3)[0].flatten(1).T.tolist()
    for a, b in zip(x[0].flatten(1).T.tolist(), ours):
        h, s, v = colorsys.rgb_to_hsv(*(i / 255 for i in a))
        want = colorsys.hsv_to_rgb(h, s, min(v + 0.15, 1))
        assert all(-1.01 < j - 255 * i < 0.01 for i, j in zip(want, b)), (a, b, want)


def test_shot_noise_is_poisson():
    x = torch.full((1, 3, 224, 224), 100, dtype=torch.uint8)
    for severity, c in enumerate(erpm.RECIPES["shot_noise"][1], 1):
        got = erpm.corrupt(x, "shot_noise", severity).float()
        want = torch.poisson(torch.full((300000,), c * 100 / 255), generator=erpm.rng(c))
        want = (want / c).clamp(max=1).mul(255).floor()
        assert abs(got.mean() - want.mean()) < 1 and abs(got.std() / want.std() - 1) < 0.02
        assert set(got.unique().tolist()) <= {float(int(255 * k / c + 1e-4)) for k in range(c + 1)}


def test_plasma_is_the_diamond_square_loop():
    side, decay = 16, 2.5
    u = erpm.draw([erpm.rng("p")], (side, side), torch.Tensor.uniform_, -1, 1)[0].double().numpy()
    m, k, a = np.zeros((side, side)), side // 2, 1.0
    while k:
        cross, plus = ((-k, -k), (-k, k), (k, -k), (k, k)), ((-k, 0), (k, 0), (0, -k), (0, k))
        for top, left, near in ((k, k, cross), (0, k, plus), (k, 0, plus)):
            for i in range(top, side, 2 * k):
                for j in range(left, side, 2 * k):
                    around = [m[(i + p) % side, (j + q) % side] for p, q in near]
                    m[i, j] = sum(around) / 4 + a * u[i, j]
        k, a = k // 2, a / decay ** 2
    m = (m - m.min()) / (m.max() - m.min())
    assert np.abs(m - erpm.plasma([erpm.rng("p")], side, decay)[0].numpy()).max() < 1e-4


def test_elastic_transform_without_movement_is_the_identity():
    x, shift = photos(2, 64, 50), torch.zeros(2, 3, 2)
    assert torch.allclose(erpm.affine(64, 50, shift), torch.eye(2, 3), atol=1e-6)
    moved = erpm.affine(64, 50, shift + torch.tensor([3.0, 0]))  # all points 3 px to the right
    assert torch.allclose(moved[:, :, 2], torch.tensor([-3.0, 0]), atol=1e-5)
    still = erpm.elastic_transform(x, (0, 0, 0), [erpm.rng(0), erpm.rng(1)])
    assert (still.int() - x.int()).abs().max() <= 1


def test_flat_images_keep_their_value_under_blur():
    x = torch.full((1, 3, 224, 224), 255, dtype=torch.uint8)
    for name in ("glass_blur", "motion_blur", "zoom_blur", "elastic_transform"):
        assert erpm.corrupt(x, name, 3).min() == 255, name
        assert torch.equal(erpm.corrupt(x // 2, name, 3), x // 2), name


def test_frost_names_its_textures_and_reads_a_folder(tmp_path):
    for i, file in enumerate(erpm.ICE_FILES):
        Image.new("RGB", (300, 300), (10 * i, 0, 0)).save(tmp_path / file, quality=100)
    assert erpm.frost_source() in ("original", "procedural")
    assert erpm.frost_source(tmp_path) == "original"
    black = torch.zeros(40, 3, 224, 224, dtype=torch.uint8)
    y = erpm.corrupt(black, "frost", 1, frost_dir=tmp_path)
    assert len(y[:, 0].flatten(1).float().mean(1).round().unique()) == 5


# ==== augmentations ====

AFFINE, BILINEAR = Image.Transform.AFFINE, Image.Resampling.BILINEAR
AUGMENTED = [*erpm.AUGMENTATIONS, "pixmix+augmix", "deepaugment+augmix", "augmix+mixup"]


def pictures(n, h=32, w=32, key=0):
    """uint8 (n,3,h,w): smooth, noisy, flat and clipped pictures in turn."""
    coarse = torch.rand(n, 3, h // 4 + 1, w // 4 + 1, generator=erpm.rng("pictures", key))
    x = F.interpolate(coarse, (h, w), mode="bicubic")
    x[1::4] = torch.rand(x[1::4].shape, generator=erpm.rng("noise", key))
    x[2::4], x[3::4] = x[2::4] * 0.1 + 0.6, (x[3::4] - 0.5) * 3
    x[0, 0] = 0.3
    return (x.clamp(0, 1) * 255).to(torch.uint8)


def shift(image, *matrix):
    return image.transform(image.size, AFFINE, matrix, resample=BILINEAR)


PIL_OPS = {  # the operations of the paper, level signed
    "autocontrast": lambda i, v: ImageOps.autocontrast(i),
    "equalize": lambda i, v: ImageOps.equalize(i),
    "posterize": lambda i, v: ImageOps.posterize(i, 4 - int(v * 4 / 10)),
    "solarize": lambda i, v: ImageOps.solarize(i, 256 - int(v * 256 / 10)),
    "rotate": lambda i, v: i.rotate(int(v * 30 / 10), resample=BILINEAR),
    "shear_x": lambda i, v: shift(i, 1, v * 0.3 / 10, 0, 0, 1, 0),
    "shear_y": lambda i, v: shift(i, 1, 0, 0, v * 0.3 / 10, 1, 0),
    "translate_x": lambda i, v: shift(i, 1, 0, int(v * (i.size[0] / 3) / 10), 0, 1, 0),
    "translate_y": lambda i, v: shift(i, 1, 0, 0, 0, 1, int(v * (i.size[1] / 3) / 10)),
}
INTERPOLATING = ("rotate", "shear_x", "shear_y")


@pytest.mark.parametrize("h, w", [(32, 32), (48, 80), (224, 224), (7, 5)])
@pytest.mark.parametrize("op", erpm.OPS, ids=lambda op: op.__name__)
def test_each_operation_is_within_a_grey_level_of_pil(op, h, w):
    x, random = pictures(8, h, w), np.random.default_rng(0)
    level = random.uniform(0.1, 9.9, 8)
    if op in erpm.GEOMETRIC_OPS:
        level *= random.choice([-1, 1], 8)
    images = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in x]
    theirs = np.stack([PIL_OPS[op.__name__](i, v) for i, v in zip(images, level.tolist())])
    gap = np.abs(op(x, level).permute(0, 2, 3, 1).numpy().astype(int) - theirs)
    if op.__name__ in INTERPOLATING:  # but for the border, where only we fade out
        cover = op(torch.full_like(x, 255), level).permute(0, 2, 3, 1).numpy()
        gap = gap[(cover == 0) | (cover == 255)]
        assert (gap > 1).mean() <= 0.005 and gap.size > (0.98 if h == 224 else 0.5) * x.numel()
    else:
        assert gap.max() <= 1


@pytest.mark.parametrize("spec", AUGMENTED)
def test_output_is_a_function_of_the_generator(spec):
    x, state = pictures(5), torch.get_rng_state()
    before = x.clone()
    a, b, c = (erpm.augment(x, spec, erpm.rng("same", k)) for k in (0, 0, 1))
    assert a.dtype == torch.uint8 and a.shape == x.shape and torch.equal(a, b)
    assert spec == "none" or not torch.equal(a, c)
    assert torch.equal(x, before), "the input was changed"
    assert torch.equal(torch.get_rng_state(), state), "the global generator moved"


@pytest.mark.parametrize("spec", [a for a in erpm.AUGMENTATIONS if a not in ("none", "erasing")])
def test_each_image_is_drawn_for_itself(spec):
    x = pictures(1).expand(16, -1, -1, -1)
    assert len(erpm.augment(x, spec, erpm.rng(0)).flatten(1).unique(dim=0)) > 8


@pytest.mark.parametrize("spec", AUGMENTED)
@pytest.mark.parametrize("shape", [(1, 32, 32), (0, 32, 32), (3, 17, 29)])
def test_any_batch_and_shape_work(spec, shape):
    x = pictures(4, *shape[1:])[:shape[0]]
    assert erpm.augment(x, spec, erpm.rng(0)).shape == x.shape


# severity: mean |augmix(x) - x| of google-research/augmix on pictures(4), 8,000 draws; its error
ORIGINAL = {1: (8.928, 0.115), 3: (15.786, 0.159)}


@pytest.mark.parametrize("severity", ORIGINAL)
def test_augmix_deviates_as_much_as_the_original(severity):
    x = pictures(4).repeat(500, 1, 1, 1)
    mixed = erpm.augmix(x, erpm.rng("deviation"), severity=severity)
    gap = (mixed.float() - x).abs().mean((1, 2, 3))
    mean, error = ORIGINAL[severity]
    assert abs(gap.mean() - mean) < 4 * (error**2 + gap.var() / len(gap)) ** 0.5


def test_a_mixture_of_no_chains_is_the_image():
    x, op = pictures(8), np.arange(8 * 3 * 2).reshape(8, 3, 2) % len(erpm.OPS)
    weights = np.eye(4)[:1].repeat(8, 0)
    assert torch.equal(erpm._mix_chains(x, weights, op, op * 0.0 + 5), x)


def test_jsd_equals_the_formula():
    z = [torch.randn(6, 5, generator=erpm.rng("logits", i)) * 3 for i in range(3)]
    p = [np.exp(v.double().numpy()) for v in z]
    p = [v / v.sum(1, keepdims=True) for v in p]
    mean = sum(p) / 3
    expected = sum((q * np.log(q / mean)).sum(1).mean() for q in p) / 3
    assert abs(erpm.jsd(*z).item() - expected) < 1e-6
    assert erpm.jsd(*(v.bfloat16() for v in z)).dtype == torch.float32
    assert erpm.jsd(z[0], z[0], z[0]) < 1e-6


def test_a_sum_is_a_sequence_in_a_fixed_order_and_options_reach_their_part():
    x, g = pictures(6), erpm.rng("sum")
    expected = erpm.augmix(erpm.pixmix(x, g), g, severity=3)
    for spec in ("pixmix+augmix", "augmix+pixmix"):
        ours = erpm.augment(x, spec, erpm.rng("sum"), augmix={"severity": 3})
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("spec, options", [
    ("augmx", {}), ("augmix+", {}), ("augmix+augmix", {}), ("augmix", {"agumix": {}})])
def test_unknown_and_repeated_names_are_errors_that_list_the_names(spec, options):
    with pytest.raises(erpm.UserError, match="augmix.*pixmix.*cutmix|pixmix.*augmix.*cutmix"):
        erpm.augment(pictures(1), spec, erpm.rng(0), **options)


@pytest.mark.parametrize("x", [torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_other_than_uint8_batches_are_errors(x):
    with pytest.raises(erpm.UserError, match="uint8"):
        erpm.augment(x, "augmix", erpm.rng(0))


def test_a_folder_of_pictures_serves_pixmix(tmp_path):
    with pytest.raises(erpm.UserError, match="no picture"):
        erpm.pixmix(pictures(2), erpm.rng(0), pictures=str(tmp_path / "none"))
    Image.new("RGB", (60, 50), (255, 0, 0)).save(tmp_path / "red.png")
    assert erpm.load_pictures(str(tmp_path), 36).shape == (1, 3, 36, 36)
    x = torch.full((64, 3, 32, 32), 100, dtype=torch.uint8)
    red, green, blue = erpm.pixmix(x, erpm.rng(0), pictures=str(tmp_path)).unbind(1)
    assert torch.equal(green, blue) and 0.3 < (red != green).flatten(1).any(1).float().mean() < 0.8


def test_pixmix_blends_equal_the_formulas():
    x, y = torch.rand(2, 1, 3, 4, 4, generator=erpm.rng(0))
    a, b = np.array([0.8]), np.array([-0.3])
    added = ((0.8 * (2 * x - 1) - 0.3 * (2 * y - 1) + 1) / 2).clamp(0, 1)
    times = ((2 * x) ** 0.8 * (2 * y) ** -0.3 / 2).clamp(0, 1)
    assert torch.allclose(erpm._blend(x, y, a, b, False), added, atol=1e-6)
    assert torch.allclose(erpm._blend(x, y, a, b, True), times, atol=1e-6)
    black = torch.zeros_like(x)
    assert torch.isfinite(erpm._blend(black, black, a, b, True)).all()


def test_cutout_greys_a_square():
    x = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    grey = erpm.augment(x, "cutout", erpm.rng(0)) == 128
    rows, columns = grey.any(3).sum(2), grey.any(2).sum(2)
    assert (grey.sum((2, 3)) == 256).all() and (rows == 16).all() and (columns == 16).all()
    assert len(grey.flatten(1).unique(dim=0)) > 100


@pytest.mark.parametrize("spec", ["mixup", "cutmix", "mixup+cutmix", "augmix+cutmix"])
def test_soft_labels_are_the_shares_of_the_pixels(spec):
    y, state, shares = torch.arange(40) % 2, torch.get_rng_state(), set()
    x = (y * 200).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    for key in range(20):
        mixed, soft = erpm.mix_labels(x, y, spec, erpm.rng(key), 5)
        assert mixed.dtype == torch.uint8 and mixed.shape == x.shape
        assert torch.allclose(mixed.float().mean((1, 2, 3)) / 200, soft[:, 1], atol=3e-3)
        assert torch.allclose(soft.sum(1), torch.ones(40))
        shares.add(soft[0, 0].item())
    assert len(shares) > 10 and torch.equal(torch.get_rng_state(), state)


def test_without_a_mixer_labels_become_one_hot():
    x, soft = erpm.mix_labels(pictures(3), torch.tensor([2, 0, 1]), "augmix", erpm.rng(0), 4)
    assert torch.equal(x, pictures(3)) and soft.argmax(1).tolist() == [2, 0, 1]


# ==== models ====

TINY_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TINY_VIT = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16}
TINY_RN = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
TINY_CLIPS = {                                      # configurations in open_clip's own file format
    "tiny": {"vision_cfg": TINY_VIT, "quick_gelu": True},
    "tiny-avg": {"vision_cfg": {**TINY_VIT, "pool_type": "avg", "final_ln_after_pool": True,
                                "no_ln_pre": True, "ls_init_value": 0.1}},
    "tiny-pool": {"vision_cfg": {**TINY_VIT, "attentional_pool": True, "attn_pooler_heads": 2,
                                 "output_tokens": True}, "custom_text": True},
    "tiny-rn": {"vision_cfg": TINY_RN},
    "tiny-timm": {"vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "map",
                                 "timm_proj": "none", "image_size": 160}, "embed_dim": 64,
                  "custom_text": True, "init_logit_bias": -10},
    "tiny-timm-linear": {"vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "",
                                        "timm_proj": "linear", "image_size": 64}},
}


@pytest.fixture(scope="session", autouse=True)
def tiny_clips(tmp_path_factory):
    """Registers the tiny configurations with open_clip under their names."""
    import open_clip
    folder = tmp_path_factory.mktemp("clips")
    for name, cfg in TINY_CLIPS.items():
        (folder / f"{name}.json").write_text(json.dumps(
            {"embed_dim": 16, "text_cfg": TINY_TEXT, **cfg}))
    open_clip.add_model_config(folder)


def by_timm(name, **kw):
    def make():
        import timm
        return timm.create_model(name, num_classes=7, **kw)
    return make


def mixer(**kw):
    def make():
        import timm
        return timm.models.MlpMixer(num_classes=7, **kw).eval()
    return make


def by_torchvision(*layers, block="BasicBlock", **kw):
    models = erpm.torchvision.models.resnet
    return lambda: models.ResNet(getattr(models, block), layers, num_classes=7, **kw)


FAST = {                                   # two small networks or more for each row of CUTS
    **{f"open_clip:{n}": f"open_clip:{n}" for n in (*TINY_CLIPS, "erpm-tiny")},
    **{n: n for n in (
        "timm:test_vit", "timm:test_vit2", "timm:test_vit3", "timm:test_resnet",
        "timm:test_convnext", "timm:test_convnext3", "timm:test_efficientnet",
        "timm:mobilenetv2_050", "timm:mobilenetv3_small_050", "timm:mobilenetv4_conv_small_035",
        "timm:regnetx_002", "timm:regnety_002", "torchvision:resnet18", "cifar:resnet8-s2")},
    "vit, token outside pos_embed": by_timm("deit3_small_patch16_224", depth=2, embed_dim=48),
    "vit, registers": by_timm("vit_small_patch14_reg4_dinov2", depth=2, embed_dim=48, img_size=28),
    "eva, rope": by_timm("eva02_tiny_patch14_224", depth=2),
    "eva, rope of a free grid": by_timm("vit_small_patch16_dinov3", depth=2, embed_dim=48,
                                        num_heads=2),
    "eva, a rope for each block": by_timm("vit_small_patch16_rope_mixed_224", depth=2),
    "resnet, squeezed": by_timm("seresnext26d_32x4d", layers=(1, 1, 1, 1), cardinality=2,
                                base_width=8),
    "swin": by_timm("swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 2, 1, 1),
                    num_heads=(1, 1, 2, 2)),
    "swin, two stages": by_timm("swin_tiny_patch4_window7_224", embed_dim=8, depths=(2, 1, 1),
                                num_heads=(1, 1, 2)),
    "swin v2": by_timm("swinv2_tiny_window8_256", embed_dim=12, depths=(1, 2, 1, 1),
                       num_heads=(1, 1, 2, 2), img_size=224, window_size=7),
    "swin v2, cr": by_timm("swinv2_tiny_window8_256", embed_dim=8, depths=(1, 1, 1),
                           num_heads=(1, 1, 2), img_size=224, window_size=14),
    "convnext, norm first": by_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 8, 8, 8),
                                    head_norm_first=True),
    "mixer": mixer(num_blocks=3, embed_dim=16), "mixer, wide": mixer(num_blocks=4, embed_dim=24),
    "torchvision resnet": by_torchvision(1, 2, 1, 1),
    "torchvision resnext": by_torchvision(1, 1, 1, 1, block="Bottleneck", groups=2,
                                          width_per_group=8),
}
NAMES = """
timm:vit_tiny_patch16_224 timm:vit_small_patch16_224 timm:vit_small_patch32_224
timm:vit_base_patch16_224 timm:vit_base_patch32_224 timm:vit_large_patch16_224
timm:vit_base_patch16_224.mae timm:deit3_small_patch16_224 timm:vit_medium_patch16_reg4_gap_256
timm:vit_small_patch14_dinov2.lvd142m timm:vit_base_patch14_dinov2.lvd142m
timm:vit_base_patch14_reg4_dinov2.lvd142m timm:vit_base_patch16_siglip_224.webli
timm:vit_base_patch16_clip_224.openai timm:vit_large_patch14_clip_336.openai
timm:vit_small_patch16_dinov3.lvd1689m timm:vit_small_patch16_rope_mixed_224
timm:eva02_tiny_patch14_224 timm:eva02_base_patch14_224 timm:eva_large_patch14_196
timm:swin_tiny_patch4_window7_224 timm:swin_base_patch4_window7_224 timm:swinv2_tiny_window8_256
timm:convnext_tiny timm:convnext_base timm:convnextv2_tiny timm:resnet18 timm:resnet34
timm:resnet50 timm:resnet101 timm:resnet152 timm:resnext50_32x4d timm:resnext101_32x8d
timm:resnetrs50 timm:regnety_032 timm:efficientnet_b0 timm:efficientnet_b4
timm:tf_efficientnet_lite0 timm:tf_efficientnetv2_s timm:mobilenetv2_100
timm:mobilenetv3_large_100 timm:mobilenetv3_small_100 timm:mixer_b16_224
torchvision:resnet34 torchvision:resnet50/IMAGENET1K_V1 torchvision:resnet101 torchvision:resnet152
torchvision:resnext50_32x4d torchvision:wide_resnet50_2 open_clip:ViT-B-32
open_clip:ViT-B-32-quickgelu/openai open_clip:ViT-B-16-quickgelu open_clip:ViT-L-14-quickgelu
open_clip:ViT-L-14-336-quickgelu/openai open_clip:RN50-quickgelu/openai
open_clip:RN101-quickgelu/openai open_clip:ViT-B-16-SigLIP/webli open_clip:convnext_base
open_clip:EVA02-B-16 open_clip:coca_ViT-B-32
open_clip:swin_base_patch4_window7_224""".split() if SLOW else []


def network(spec, rough=False):
    """The network of a name or a maker; rough: with random numbers where a fresh one has zeros and
    ones, for a scale of 0 would hide a block."""
    torch.manual_seed(0)
    net = erpm.build(spec, 7, "random") if isinstance(spec, str) else spec().eval()
    with torch.no_grad():
        for p in net.parameters() if rough else ():
            if p.ndim < 2 or not p.any():
                p.normal_(0.5, 0.3)
    return net


def side(net):
    return (net.card.size_px or 64) if isinstance(net, erpm.Net) else 28 if getattr(
        getattr(net, "patch_embed", None), "img_size", None) == (28, 28) else 224


@pytest.mark.parametrize("spec", [*FAST.values(), *NAMES], ids=[*FAST, *NAMES])
def test_stages_equal_the_network_exactly(spec):
    net = network(spec, rough=True)
    x, parts = images(2, side(net)) / 255, erpm.stages(net)
    with torch.no_grad():
        z = net(x)
        assert torch.equal(parts(x), z)
    ours, theirs = ({id(p) for p in m.parameters()} for m in (parts, net))
    assert ours == theirs and z.shape == (2, 7) and z.std() > 0 and z.isfinite().all()
    assert len(parts) >= 4 and parts[-1].fc.out_features == 7
    keys = [[k for k in m.state_dict() if "rope." not in k] for m in (parts, net)]
    assert len(keys[0]) == len(keys[1])


@pytest.mark.parametrize("label", ["timm:test_vit", "timm:test_efficientnet", "timm:test_convnext",
                                   "timm:mobilenetv3_small_050", "open_clip:tiny",
                                   "open_clip:tiny-rn", "open_clip:tiny-timm", "swin", "mixer",
                                   "eva, rope", "torchvision:resnet18"])
def test_a_student_trains_predicts_and_is_loaded_again_on_every_family(label, tmp_path):
    net = network(FAST[label])
    student, x = erpm.Student(net, 2, 1, 0.3), images(2, side(net))
    kept = {k: v.clone() for k, v in student.state_dict().items()
            if not k.startswith("tuned.") or "running" in k or "num_b" in k}
    before = {k: v.clone() for k, v in student.tuned.heads["clean"][0].state_dict().items()}
    optimizer = torch.optim.SGD(student.tuned.parameters(), 0.01)
    for _ in range(2):
        z = student.train()(x)
        sum(F.cross_entropy(h, torch.tensor([0, 6])) for h in z).backward()
        optimizer.step()
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in kept.items())
    after = student.tuned.heads["clean"][0].state_dict()
    assert all(p.grad is not None for p in student.tuned.parameters())
    assert any(not torch.equal(v, after[k]) for k, v in before.items())
    p = student.eval().predict(x, passes=3)
    assert p.probs.shape == (2, 7) and p.probs.isfinite().all() and (p.sigma > 0).any()
    erpm.save(tmp_path / "model.safetensors", student)
    other = None if isinstance(net, erpm.Net) else network(FAST[label])
    again = erpm.load(tmp_path, net=other).predict(x, passes=3)
    assert torch.allclose(again.probs, p.probs, atol=1e-5)     # other memory, other kernels
    assert torch.allclose(again.sigma, p.sigma, atol=1e-5)


def test_stages_of_a_chain_equal_it_and_keep_its_modules():
    net, x = tiny_net(), torch.rand(3, 3, 32, 32)
    parts = erpm.stages(net)
    assert len(parts) == 4 and parts[1] is net[1] and parts[-1].fc is net[-1]
    assert torch.equal(parts(x), net(x))
    loose = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
                          nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    assert len(erpm.stages(loose)) == 4 and torch.equal(erpm.stages(loose)(x), loose(x))


@pytest.mark.parametrize("net, says, settings", [
    (nn.Conv2d(3, 3, 1), "cannot be cut into stages: known are timm.VisionTransformer,", {}),
    (nn.Sequential(nn.Conv2d(3, 3, 1), nn.Softmax(1)), "without a final Linear layer", {}),
    (nn.Sequential(), "cannot be cut", {}), (nn.Sequential(nn.Linear(3, 2)), "cannot be cut", {}),
    ("torchvision:shufflenet_v2_x0_5", "or pass an nn.Sequential of your own that ends", {}),
    ("timm:test_vit", "without a final Linear layer cannot be cut: build it with classes=N", {}),
    (tiny_net(), "tune = 9: the network has ", {"tune": 9}),
    (tiny_net(), "head = 2: expected 0 to tune = 1", {"head": 2}),
    (tiny_net(), "dropout = 1.0: expected", {"dropout": 1.0}),
    (tiny_net(), "dropout = -0.1", {"dropout": -0.1})])
def test_what_cannot_be_cut_says_so(net, says, settings):
    net = erpm.build(net, 0) if isinstance(net, str) else net
    with refuses(says):
        erpm.Student(net, **{"tune": 1, "head": 0} | settings)


@pytest.mark.parametrize("name, says", [
    ("resnet50", "expected FAMILY:NAME"), ("timmm:resnet50", "did you mean 'timm'?"),
    ("timm:resnet5", "unknown network of timm 'resnet5'; did you mean"),
    ("timm:resnet50.foo", "unknown network of timm 'resnet50.foo'"),
    ("cifar:resnet21", "expected cifar:resnetD"), ("cifar:resnet8-w0", "expected cifar:resnetD"),
    ("cifar:resnet-8", "expected cifar:resnetD"), ("run:nowhere", "no trained model nowhere"),
    ("torchvision:resnet5", "unknown network of torchvision 'resnet5'; did you mean"),
    ("torchvision:resnet50/V1", "unknown weights of torchvision:resnet50 'V1'"),
    ("open_clip:ViT-B-33", "unknown network of open_clip 'ViT-B-33'; did you mean 'ViT-B-32'"),
    ("open_clip:ViT-B-32-quickgelu/opnai", "did you mean 'openai'"),
    ("open_clip:ViT-B-32/openai", "use open_clip:ViT-B-32-quickgelu/openai"),
])
def test_an_unknown_network_is_one_clear_line(name, says):
    with refuses(says):
        erpm.build(name)
    assert erpm.build(net := tiny_net()) is net


def test_a_tag_says_classes_normalisation_size_and_view():
    assert [erpm.has_tag(n) for n in ("timm:resnet50.tv_in1k", "torchvision:resnet50/DEFAULT",
                                      "open_clip:RN50/openai")] == [True] * 3
    assert [erpm.has_tag(n) for n in ("timm:resnet50", "torchvision:resnet50", "open_clip:RN50",
                                      "cifar:resnet8", "run:a/b.c")] == [False] * 5
    card = erpm.build("torchvision:mobilenet_v2/IMAGENET1K_V2", 5, "random").card
    assert (card.n_classes, card.size_px, card.view) == (5, 224, erpm.View(224, 224 / 232))
    assert card.view.resized == [232] and not erpm.build("torchvision:mobilenet_v2").card.size_px
    card = erpm.build("timm:vit_base_patch14_dinov2.lvd142m", 5, "random", size_px=28).card
    assert (card.size_px, card.view) == (28, erpm.View(28, 1.0, "bicubic"))
    net = erpm.build("open_clip:tiny")
    assert net.card == erpm.Card("open_clip:tiny", 0, 32, erpm.View(32, 1.0, "bicubic"))
    assert torch.allclose(net.mean.flatten(), torch.tensor([0.4815, 0.4578, 0.4082]), atol=1e-4)
    assert not net.training and net(images(2, 32)).shape == (2, 16)


@pytest.mark.parametrize("name, own", [("timm:test_vit", 160), ("timm:resnet18", 0),
                                       ("cifar:resnet8", 0), ("torchvision:resnet18", 0),
                                       ("open_clip:tiny-rn", 64), ("open_clip:tiny-timm", 160)])
def test_size_px_is_the_size_at_which_a_network_runs(name, own):
    seen, x = [], images(2, 40)
    assert erpm.build(name, 3).card.size_px == own
    net = erpm.build(name, 3, size_px=96)
    net.net.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[-1]))
    assert net(x).shape == (2, 3) and seen == [96]
    assert (net.card.size_px, net.card.view.size_px) == (96, 96)
    erpm.Student(net, 1, 1)                                # is cut and checked at that size


def test_weights_come_from_any_plain_file_and_nothing_else(tmp_path):
    name, x, file = "torchvision:mobilenet_v3_small", images(1, 64), tmp_path / "w.pth"
    net = erpm.build(name, 7)
    state = {k: v for k, v in net.net.state_dict().items() if "num_batches" not in k}
    again = lambda: erpm.build(name, 7, str(file)).net(net.prepare(x))              # noqa: E731
    for tree_ in (state, {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
                  {"model": state, "optimizer": {"lr": 0.1}}, net.state_dict()):
        torch.save(tree_, file)
        assert torch.equal(again(), net(x))
    torch.save(state, file, _use_new_zipfile_serialization=False)
    assert torch.equal(again(), net(x))
    for tree_, says in (({"args": Path("x"), "model": state}, "nothing is unpickled here"),
                        ({"epoch": 3}, "holds no state dict but epoch"),
                        ({**state, "more": x}, "does not fit"),
                        ({k: v for k, v in state.items() if k != "features.0.0.weight"},
                         "features.0.0.weight")):
        torch.save(tree_, file)
        with refuses(says):
            again()
    for content in (b"not weights", b""):
        file.write_bytes(content)
        with refuses("is no file of plain tensors"):
            again()
    with refuses("no weights file none.pth"):
        erpm.build(name, 7, "none.pth")


@pytest.mark.parametrize("name", ["cifar:resnet8-s2", "timm:test_vit", "torchvision:resnet18",
                                  "timm:test_convnext", "timm:test_efficientnet"])
def test_a_file_brings_its_classifier_or_gets_a_new_one(name, tmp_path):
    file, net = str(tmp_path / "w.safetensors"), network(name)
    erpm.save(file, net)
    x = images(2, net.card.view.size_px)
    plain = tmp_path / "w.pth"
    torch.save(net.net.state_dict(), plain)
    for f in (file, str(plain)):
        for classes in (7, None):                       # NAME=FILE: the file's own number
            same = erpm.build(name, classes, f)
            assert same.card.n_classes == 7 and not same.card.fresh
            assert torch.allclose(same(x), net(x), atol=1e-5)
        other = erpm.build(name, 3, f)
        assert other.card.fresh and other.card.n_classes == 3 and other(x).shape == (2, 3)
        a, b = (erpm.stages(n) for n in (other, net))
        assert torch.equal(a[-1].features(a[:-1](x)), b[-1].features(b[:-1](x)))
    assert erpm.build(name, 7).card.fresh


def test_the_weights_of_an_encoder_alone_leave_a_new_classifier(tmp_path):
    file, x = str(tmp_path / "encoder.pth"), images(1, 160)
    encoder = erpm.build("timm:test_vit", 0)
    torch.save(encoder.net.state_dict(), file)
    net = erpm.build("timm:test_vit", 3, file)
    assert net.card.fresh
    assert torch.equal(erpm.stages(net)[-1].features(erpm.stages(net)[:-1](x)), encoder(x))
    alone = erpm.build("timm:test_vit", None, file)
    assert alone.card.n_classes == 0 and torch.equal(alone(x), encoder(x))
    torch.save(net.net.state_dict(), file)
    with refuses("encoder.pth does not fit timm:test_vit"):
        erpm.build("timm:test_vit", 0, file)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_whole_clip_gives_its_visual_tower_strictly(kind, tmp_path):
    clip, file, x = erpm.clip_model("tiny"), str(tmp_path / f"clip.{kind}"), images(2, 32)
    if kind == "safetensors":
        Path(file).write_bytes(erpm.safetensors_bytes(clip.state_dict()))
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, file)
    net = erpm.build("open_clip:tiny", 5, file)
    assert torch.equal(net.net.visual(net.prepare(x)), clip.encode_image(net.prepare(x)))
    whole = erpm.clip_model("tiny", file)
    assert equal(whole, clip) and not whole.training and net.card.fresh
    with refuses("open_clip:tiny-avg"):
        erpm.build("open_clip:tiny-avg", 5, file)


def test_weights_of_a_tag_with_other_classes_come_with_a_new_classifier(monkeypatch):
    theirs = erpm.torchvision.models.mobilenet_v3_small()
    hub = erpm.torchvision.models.WeightsEnum
    monkeypatch.setattr(hub, "get_state_dict", lambda *a, **kw: dict(theirs.state_dict()))
    name = "torchvision:mobilenet_v3_small/IMAGENET1K_V1"
    one, five = erpm.build(name), erpm.build(name, 5)
    state = {k: v for k, v in five.net.state_dict().items() if not k.startswith("classifier.3.")}
    assert equal(one.net, theirs) and not one.card.fresh and five.card.fresh
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in state.items())
    assert (one.card.n_classes, five.card.n_classes) == (1000, 5)

    def offline(*a, **kw):
        raise OSError("no\nroute")
    monkeypatch.setattr(hub, "get_state_dict", offline)
    monkeypatch.setattr("timm.create_model", offline)
    monkeypatch.setattr("open_clip.create_model", offline)
    for name in (name, "open_clip:ViT-B-32-quickgelu/openai", "timm:resnet18.tv_in1k"):
        with refuses(f"{name} could not be had (OSError: no): without a network give its weights"):
            erpm.build(name)


# ==== method ====

def student(**kw):
    torch.manual_seed(1)
    return erpm.Student(tiny_net(), **{"tune": 2, "head": 1, "dropout": 0.3, **kw}).eval()


def moved(s):
    """The Student with three heads that differ."""
    with torch.no_grad():
        for k, p in s.tuned.named_parameters():
            p += 0.05 * torch.randn(p.shape, generator=erpm.rng("p", k))
    return s


@pytest.mark.parametrize("head", [0, 1, 2])
def test_before_tuning_every_head_is_the_original_network(head):
    s, x = student(head=head), torch.rand(4, 3, 32, 32)
    for z in (*s(x), s.original(s.features(x))):
        assert torch.equal(z, tiny_net()(x))
    assert torch.equal(s(images(4)).clean, tiny_net()(images(4) / 255))


def test_clean_head_sees_no_augmented_image_and_robust_head_no_clean_one():
    s, f = moved(student()), torch.rand(6, 8, 16, 16)
    z = s.tuned(f, 2)
    assert [len(h) for h in z] == [2, 6, 4]
    grads = {name: torch.autograd.grad(h.sum(), s.tuned.heads[name][-1].fc.weight,
                                       retain_graph=True)[0] for name, h in z._asdict().items()}
    assert all(g.abs().sum() > 0 for g in grads.values())
    assert torch.allclose(z.clean, s.tuned(f[:2]).clean)
    assert torch.allclose(z.robust, s.tuned(f[2:]).robust)


@pytest.mark.parametrize("kind", ["chain", "timm:test_vit", "open_clip:tiny"])
def test_dropout_is_live_where_a_pretrained_network_has_none(kind):
    net = tiny_net() if kind == "chain" else erpm.build(kind, 5)
    s = erpm.Student(net, 2, 1, 0.3)
    drops = [m for m in s.tuned.modules() if isinstance(m, erpm.Dropout)]
    assert len(drops) >= 1 + 3 + 3 and all(d.p == 0.3 for d in drops)
    only = erpm.Student(tiny_net(), 2, 1, 0.3, dropout_in="head")
    assert sum(isinstance(m, erpm.Dropout) for m in only.tuned.modules()) == 3
    if kind == "open_clip:tiny":                            # in the residual branches
        part = erpm.put_dropout(erpm.stages(net)[2], 0.5, 0)
        assert isinstance(part.ls_1[1], erpm.Dropout) and isinstance(part.ls_2[1], erpm.Dropout)


def test_training_mode_switches_dropout_and_nothing_else():
    s = student().train()
    live = {type(m).__name__ for m in s.modules() if m.training}
    assert live <= {"Student", "ThreeHeads", "Dropout"} and "Dropout" in live
    assert not any(m.training for m in s.eval().modules())


def test_the_frozen_part_stays_equal_bit_for_bit():
    s = student()
    frozen = {k: v.clone() for k, v in s.state_dict().items()
              if not k.startswith("tuned.") or "running" in k or "num_b" in k}
    before = s.tuned.heads["clean"][-1].fc.weight.clone()
    erpm.distill(s, tiny_net(), shown(n=32), epochs=2, batch=16)
    assert not torch.equal(before, s.tuned.heads["clean"][-1].fc.weight)
    assert all(torch.equal(v, s.state_dict()[k]) for k, v in frozen.items())


def test_head_loss_is_the_formula_worked_by_hand():
    z, zt, y, a, t = (
        np.array([[1., 2, 0], [0, 1, 1]]), np.array([[0., 3, 1], [2, 0, 1]]), [1, 0], 0.3, 2.0)
    soft = lambda v: np.exp(v) / np.exp(v).sum(-1, keepdims=True)              # noqa: E731
    p, q = soft(zt / t), soft(z / t)
    for smooth in (0.0, 0.2):
        target = np.eye(3)[y] * (1 - smooth) + smooth / 3
        ce = -(target * np.log(soft(z))).sum(-1).mean()
        want = (1 - a) * ce + a * t * t * (p * np.log(p / q)).sum(-1).mean()
        got = erpm.head_loss(torch.tensor(z), torch.tensor(zt), torch.tensor(y), a, t, smooth)
        assert math.isclose(float(got), want, rel_tol=1e-5)


def test_the_losses_are_those_of_equations_3_and_4():
    g = erpm.rng("loss")
    draw = lambda n: torch.randn(n, 5, generator=g)                            # noqa: E731
    z, z0, zt, y = (
        erpm.Heads(draw(4), draw(8), draw(4)), draw(4), draw(4), torch.tensor([0, 1, 2, 3]))
    parts = erpm.erpm_loss(z, z0, zt, y, alpha=0.4, t=3.0)
    one = lambda h, teacher: erpm.head_loss(h, teacher, y, 0.4, 3.0)           # noqa: E731
    clean = one(z.clean, z0) + one(z.combined[:4], z0)
    robust = one(z.robust, zt) + one(z.combined[4:], zt)
    assert torch.isclose(sum(parts.values()), clean + robust)
    assert erpm.erpm_loss(z, z0, z0, y, alpha=0.4, t=3.0)["robust"] != parts["robust"]


def test_student_and_teacher_see_the_same_augmented_pixels():
    seen, raw = {}, {}

    def net(name, size, mean):
        eye = nn.Identity()
        eye.register_forward_hook(lambda m, a, x: seen.update({name: x}))
        body = nn.Sequential(eye, *tiny_net())
        return erpm.Net(body, erpm.Card(size_px=size), (mean,) * 3, (0.25,) * 3).eval()

    s, teacher = erpm.Student(net("student", 32, 0.5), 1, 1), net("teacher", 48, 0.2)
    for m in (s.backbone, teacher):
        m.register_forward_pre_hook(lambda m, a: raw.update({m: a[0]}))
    x, y = images(6), torch.arange(6) % 5
    see = erpm.frozen_views(s.backbone, erpm.Robustify(augment="augmix"), True, s.original, teacher)
    step = erpm.erpm_step(erpm.Distill(), see)
    step(s.tuned, erpm.Batch(x, y, erpm.rng(0)))
    assert torch.equal(raw[s.backbone][6:], raw[teacher]) and raw[teacher].dtype == torch.uint8
    assert not torch.equal(raw[teacher], x) and torch.equal(raw[s.backbone][:6], x)
    grown = F.interpolate(raw[teacher] / 255, (48, 48), mode="bicubic", antialias=True)
    assert torch.allclose(seen["teacher"], (grown - 0.2) / 0.25, atol=1e-5)
    assert torch.allclose(seen["student"][6:], (raw[teacher] / 255 - 0.5) / 0.25, atol=1e-5)


@pytest.mark.parametrize("where", ["tail", "head", "vit"])
def test_batched_passes_equal_one_pass_after_another(where):
    s = moved(student(dropout_in=where) if where != "vit" else erpm.Student(
        erpm.build("timm:test_vit", 5), 2, 1, 0.3))
    f, t = s.features(torch.rand(3, 3, 32, 32)), 4
    with torch.no_grad(), s._sampling(f, t) as repeated:
        batched = s.tuned(repeated)
    drops = [m for m in s.tuned.modules() if isinstance(m, erpm.Dropout)]
    masks = [d.masks for d in drops]
    for i in range(t):
        for d, m in zip(drops, masks):
            d.masks = m[i:i + 1]
        with torch.no_grad(), s._sampling(f, 1) as once:
            alone = s.tuned(once)
        for a, b in zip(alone, batched):
            assert torch.allclose(a, b[3 * i:3 * i + 3], atol=1e-5)


def test_a_prediction_does_not_depend_on_the_rest_of_the_batch():
    s, x = moved(student()), torch.rand(8, 3, 32, 32)
    for passes in (0, 5):
        whole, alone = s.predict(x, passes), s.predict(x[2:3], passes)
        assert torch.allclose(whole.probs[2:3], alone.probs, atol=1e-6)
        assert torch.allclose(whole.sigma[2:3], alone.sigma, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(s.predict(x, 5), s.predict(x, 5)))


@pytest.mark.parametrize("ids", [None, [[4, 4], [0, 3], [2, 2]]])
def test_closed_form_is_the_limit_of_many_passes(ids):
    s = moved(student(tune=2, head=2, dropout=0.01, dropout_in="head"))
    f, ids = s.features(torch.rand(16, 3, 32, 32)), ids and torch.tensor(ids)
    p0, s0, z0 = s.moments(f, 0, ids)
    p1, s1, z1 = s.moments(f, 4000, ids)
    assert torch.allclose(s0, s1, rtol=0.1, atol=1e-4) and torch.allclose(p0, p1, atol=1e-2)
    assert torch.allclose(z0, z1, atol=0.05) and s0.min() > 0
    h, w, p = torch.rand(6), torch.rand(6), 0.2              # the textbook variance of a logit
    z = F.dropout(h.expand(400000, -1), p) @ w
    assert math.isclose(float(z.var()), float(p / (1 - p) * (w * h).square().sum()), rel_tol=0.02)


def test_divergence_is_the_kl_to_the_combined_head():
    mean = torch.rand(4, 3, 5, generator=erpm.rng(1)).softmax(-1)
    want = [[(mean[b, h] * (mean[b, h] / mean[b, 1]).log()).sum() for h in (0, 2)]
            for b in range(4)]
    assert torch.allclose(erpm.divergence(mean), torch.tensor(want), atol=1e-6)


def test_each_rule_picks_the_head_worked_by_hand():
    mean = torch.tensor([[[.8, .1, .1], [.7, .2, .1], [.4, .5, .1]],      # clean sits near combined
                         [[.9, .05, .05], [.1, .8, .1], [.1, .85, .05]]])  # robust does
    sigma = torch.tensor([[.1, .2], [.1, .2]])
    pick = lambda rule, **kw: erpm.select(mean, sigma, rule, **kw).tolist()    # noqa: E731
    assert pick("kl") == [0, 2] and pick("sigma") == [0, 0] and pick("product") == [0, 2]
    assert pick("sum") == [0, 2] and pick("soft") == [0, 2]
    assert pick("max-prob") == [0, 0] and pick("entropy") == [0, 0]
    assert pick("max-logit", logits=torch.tensor(
        [[[1., 0, 0], [9, 9, 9], [0, 2, 0]]] * 2)) == [2, 2]
    assert [pick(h)[0] for h in erpm.HEADS] == [0, 1, 2]
    assert (pick("oracle", y=torch.tensor([1, 0])) == [2, 0]
            and pick("oracle", y=torch.tensor([2, 2])) == [0, 0])


def test_soft_mixes_by_the_inverse_objective():
    mean, sigma = torch.rand(2, 3, 4).softmax(-1), torch.tensor([[.1, .3], [.2, .1]])
    o = sigma * erpm.divergence(mean)
    w = (1 / o) / (1 / o).sum(1, keepdim=True)
    want = w[:, :1] * mean[:, 0] + w[:, 1:] * mean[:, 2]
    assert torch.allclose(erpm.answer(mean, sigma, torch.zeros(2).long(), "soft"), want, atol=1e-5)


def test_sigma_0_and_missing_inputs_are_refused():
    mean, x = torch.rand(2, 3, 4), torch.rand(2, 3, 32, 32)
    with refuses("sigma is 0 everywhere"):
        erpm.select(mean, torch.zeros(2, 2), "product")
    for rule, says in (("oracle", "needs the labels"), ("max-logit", "needs the logits"),
                       ("prodct", "did you mean 'product'?")):
        with refuses(says):
            erpm.select(mean, torch.ones(2, 2), rule)
    with refuses("needs sigma, which is 0 without dropout"):
        student(dropout=0.0).predict(x)
    assert student(dropout=0.0).predict(x, rule="kl").head.shape == (2,)


def test_what_is_saved_comes_back_equal_also_on_a_network_of_ones_own(tmp_path):
    x, file = images(4), tmp_path / "model.safetensors"
    own = lambda: erpm.Net(tiny_net(), mean=(0.4,) * 3, std=(0.2,) * 3)        # noqa: E731
    for m, net in ((moved(erpm.Student(erpm.build("cifar:resnet8", 4), 2, 1, 0.2)), None),
                   (moved(student()), tiny_net()), (moved(erpm.Student(own())), own()),
                   (own(), own()), (tiny_net(), tiny_net())):
        erpm.save(file, m.eval())
        back = erpm.load(tmp_path, net=net)
        same = [n(x if hasattr(n, "card") else x / 255) for n in (m, back)]
        assert all(torch.equal(a, b) for a, b in zip(*same)) and not back.training
    with refuses("does not fit"):
        erpm.load(tmp_path, net=tiny_net(7))
    with refuses(f"load({str(file)!r}, net=MODULE)"):
        erpm.load(tmp_path)
    file.write_bytes(erpm.safetensors_bytes({"x": torch.zeros(2)}))
    with refuses("build(NAME, weights="):
        erpm.load(file)


# ==== training ====

def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [erpm.lr_at(i, 100, 10, 1.0) for i in range(101)]
    assert rates[0] > 0 and max(rates) == rates[10] == 1 and rates[100] == pytest.approx(0)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def seeded_net():
    torch.manual_seed(0)
    return erpm.build("cifar:resnet8-s2", 5)


def quick_fit(out=None, model=None, step=None, key=None, **cfg):
    model = model or seeded_net()
    cfg = erpm.Train(**{"epochs": 2, "batch": 16, "lr": 1e-3, **cfg})
    erpm.fit(model, step or erpm.plain_step(cfg), shown(n=64).training(0), cfg,
             erpm.Runtime(amp="none", log_every=1, save_every=3), name="t", seed=0,
             checkpoint=out and out / "t.ckpt", key=key or {})
    return model


def test_accumulated_micro_batches_equal_one_batch():
    nets = []
    for accum in (1, 4):
        backbone, tail = erpm.cut(seeded_net(), 2)
        part = erpm.Tuned(tail.requires_grad_(True))
        step = erpm.tail_step(erpm.Train(), erpm.frozen_views(backbone))
        nets.append(quick_fit(model=part, step=step,
                              accum=accum))
    for p, q in zip(*(n.parameters() for n in nets)):
        assert torch.allclose(p, q, atol=2e-5)


def test_averaged_weights_are_the_ones_kept():
    states = []

    def watching(model, batch):
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return erpm.plain_step(erpm.Train())(model, batch)
    states.append(quick_fit(step=watching).state_dict())
    kept, (first, *rest) = quick_fit(ema=0.7).state_dict(), states[1:]
    for k, v in first.items():
        for s in rest:
            v = 0.7 * v + 0.3 * s[k]
        assert "num_batches" in k or torch.allclose(v, kept[k], atol=1e-6)


def test_weight_decay_spares_biases_and_norms_and_clip_bounds_the_step():
    for name in ("adamw", "sgd"):
        opt = erpm.make_optimizer(seeded_net(), erpm.Train(optimizer=name, weight_decay=0.5))
        decays = {g["weight_decay"]: {p.ndim for p in g["params"]} for g in opt.param_groups}
        assert decays[0.0] == {1} and decays[0.5] == {2, 4}
    loud = lambda m, b: (1e6 * m(b.x).square().mean(), {})                     # noqa: E731
    still = dict(optimizer="sgd", weight_decay=0.0, epochs=0.25, lr=1.0, warmup=0)
    start, net = seeded_net(), quick_fit(step=loud, clip=0.01, **still)
    gap = sum((p - q).square().sum() for p, q in zip(net.parameters(), start.parameters())) ** 0.5
    assert float(gap) == pytest.approx(0.01 * 1.9, rel=1e-3)                   # Nesterov: 1 + 0.9


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with refuses("t: the loss is not finite at step 1"):
        quick_fit(tmp_path, step=lambda m, b: (m(b.x).sum() * math.nan, {}))
    assert not (tmp_path / "t.ckpt").exists()


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_stopped_fit_goes_on_to_the_same_weights(tmp_path, ema):
    whole, calls = quick_fit(tmp_path / "a", ema=ema), []

    def interrupting(model, batch):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return erpm.plain_step(erpm.Train())(model, batch)
    with pytest.raises(erpm.Interrupted, match="stopped at step 6 of 8"):
        quick_fit(tmp_path / "b", step=interrupting, ema=ema)
    assert equal(quick_fit(tmp_path / "b", ema=ema), whole)
    a, b = (erpm.read_jsonl(tmp_path / d / "log.jsonl") for d in "ab")
    assert [(r["step"], r["loss"]) for r in a] == [(r["step"], r["loss"]) for r in b]
    assert len(a) == 8 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_checkpoint_of_other_settings_or_a_damaged_one_is_refused(tmp_path):
    def stop(model, batch):
        os.kill(os.getpid(), signal.SIGINT)
        return erpm.plain_step(erpm.Train())(model, batch)
    with pytest.raises(erpm.Interrupted):
        quick_fit(tmp_path, step=stop, key={"a.lr": 1})
    with refuses("half-done job with other settings (a.lr: 1 -> 2)"):
        quick_fit(tmp_path, key={"a.lr": 2})
    for content in (b"", b"junk", (tmp_path / "t.ckpt").read_bytes()[:999]):
        (tmp_path / "t.ckpt").write_bytes(content)
        with refuses("t.ckpt is damaged: delete"):
            quick_fit(tmp_path)


# ==== evaluation ====

def slow_figures(p, y):
    """Counts, NLL and calibration error of probabilities, image by image."""
    correct = correct5 = nll = 0
    bins = [[0, 0, 0.0] for _ in range(15)]
    edges = torch.linspace(0, 1, 16)
    for row, label in zip(p, y.tolist()):
        ranked = sorted(range(len(row)), key=lambda k: (-float(row[k]), k))
        confidence = row[ranked[0]]
        right = ranked[0] == label
        correct, correct5 = correct + right, correct5 + (label in ranked[:5])
        nll -= math.log(float(row[label]))
        for b, lo, hi in zip(bins, edges[:-1], edges[1:]):
            if lo < confidence <= hi:
                b[0], b[1], b[2] = b[0] + 1, b[1] + right, b[2] + float(confidence)
    ece = sum(n / len(p) * abs(c / n - s / n) for n, c, s in bins if n)
    return {"correct": correct, "correct5": correct5,
            "nll": pytest.approx(nll / len(p), abs=2e-5), "ece": pytest.approx(ece, abs=2e-6)}


def test_figures_of_a_plain_network_are_those_of_a_slow_loop():
    ids = torch.tensor([[0, 3]] + [[k, k] for k in (1, 2, 4, 5, 6, 7, 8)] + [[9, 10]])
    data = shown(9, 60, ids=ids)
    z = (3 * torch.randn(60, 11, generator=erpm.rng("z"))).round() / 2               # many ties
    at = {bytes(x.numpy()): k for k, x in enumerate(data.images)}
    predict = lambda x: z[[at[bytes(i.numpy())] for i in x]]                          # noqa: E731
    p = erpm.project(z, ids).softmax(-1)
    for batch in (16, 60, 7):
        got = erpm.evaluate(predict, data, batch=batch, amp="none")
        assert got == {"n": 60, **slow_figures(p, torch.tensor(data.y))}


@pytest.mark.parametrize("passes, dropout", [(4, 0.3), (0, 0.3), (4, 0.0)])
def test_figures_of_every_rule_are_those_of_a_slow_loop(passes, dropout):
    s, data = moved(student(dropout=dropout)), shown(5, 50)
    y, f = torch.tensor(data.y), s.features(data.images)
    got = erpm.evaluate(s, data, batch=16, passes=passes, amp="none")
    assert ("product" in got["rules"]) == bool(dropout) and len(got["rules"]) == (
        len(erpm.RULES) + bool(passes) if dropout else len(erpm.RULES) - len(erpm.NEEDS_SIGMA))
    for rule, found in got["rules"].items():
        closed = rule.endswith("(closed form)")
        mean, sigma, logits = s.moments(f, 0 if closed else passes)
        rule = rule.removesuffix(" (closed form)")
        head = erpm.select(mean, sigma, rule, logits=logits, y=y)
        assert found == {**slow_figures(erpm.answer(mean, sigma, head, rule), y),
                         "heads": torch.bincount(head, minlength=3).tolist()}
        if rule != "oracle" and not closed:
            p = s.predict(data.images, passes, rule)
            assert found["correct"] == int((p.probs.argmax(-1) == y).sum())
    assert got["kl"] == pytest.approx(erpm.divergence(s.moments(f, passes)[0]).mean(0).tolist(),
                                      abs=1e-5)


def test_a_cell_is_the_corruption_of_the_same_images():
    data, net = shown(5, 20), erpm.Net(tiny_net())
    got = erpm.evaluate(net, data, ("contrast", 4), batch=8, amp="none", jpeg=True)
    x = erpm.corrupt(data.images, "contrast", 4, jpeg=True)
    assert got == erpm.evaluate(net, (x, data.y), amp="none")
    assert got["nll"] != erpm.evaluate(net, data, ("contrast", 3), amp="none")["nll"]


def test_outputs_that_are_not_finite_are_refused():
    z = torch.zeros(16, 5)
    z[3, 2] = math.nan
    with refuses("its outputs are not finite (NaN or inf) for 1 of 16 images"):
        erpm.evaluate(lambda x: z, shown(5, 16))


def test_tensors_loaders_and_sets_are_scored_alike():
    net, x, y = erpm.Net(tiny_net()), images(30), torch.arange(30) % 5
    pairs = TensorDataset(x / 255, y)                            # floats, as of ToTensor
    want = erpm.evaluate(net, (x, y))
    assert want["n"] == 30 and want == erpm.evaluate(net, DataLoader(pairs, 7))
    assert want == erpm.evaluate(net, pairs) == erpm.evaluate(lambda x: net(x), (x, y))
    got = erpm.evaluate(erpm.Student(tiny_net(), 1, 1), (x, y))["rules"]["clean"]
    assert got["correct"] == want["correct"]


# ---- linear probes ----

def blobs(n=90, d=4, c=3):
    g = erpm.rng("blobs")
    y = torch.arange(n) % c
    x = torch.randn(c, d, generator=g)[y] + torch.randn(n, d, generator=g)
    return x * torch.tensor([1.0, 10, 0.1, 1]) + 5, y


def test_a_linear_probe_is_the_optimum_that_slow_gradient_descent_finds():
    x, y = blobs()
    weight, bias, l2 = erpm.linear_probe(x, y, 3, l2s=(0.01,))
    u = ((x - x.mean(0)) / x.std(0, correction=0)).double()
    w = torch.zeros(3, 5, dtype=torch.double, requires_grad=True)
    for _ in range(3000):
        loss = F.cross_entropy(u @ w[:, :4].T + w[:, 4], y) + 0.005 * w[:, :4].square().sum()
        w = (w - torch.autograd.grad(loss, w)[0]).detach().requires_grad_()
    slow, ours = (u @ w[:, :4].T + w[:, 4]).softmax(-1), (x @ weight.T + bias).softmax(-1)
    assert l2 == 0.01 and torch.allclose(slow.float(), ours, atol=1e-4)


def test_the_strength_of_a_probe_fits_images_that_it_has_not_seen():
    x, y = blobs(300)
    noisy = torch.cat([x, torch.randn(300, 200, generator=erpm.rng("noise"))], 1)
    chosen = erpm.linear_probe(noisy[:90], y[:90], 3)[2]
    losses = {}
    for l2 in erpm.PROBE_L2:
        w, b, _ = erpm.linear_probe(noisy[:90], y[:90], 3, l2s=(l2,))
        losses[l2] = float(F.cross_entropy(noisy[90:] @ w.T + b, y[90:]))
    assert losses[chosen] < 0.7 * losses[min(erpm.PROBE_L2)] and chosen > min(erpm.PROBE_L2)
    assert all(torch.equal(a, b) for a, b in zip(*(erpm.linear_probe(x, y, 3)[:2] for _ in "ab")))


def test_features_of_each_head_and_its_linear_layer_are_that_head():
    s, x = moved(student()), images(4)
    with torch.no_grad():
        for name, z in s(x)._asdict().items():
            h = erpm.frozen_features(s, name)(x)
            assert torch.equal(s.tuned.heads[name][-1].fc(h), z)
        net = tiny_net()
        assert torch.equal(net[-1](erpm.frozen_features(s, "original")(x)), net(x / 255))
        assert torch.equal(net[-1](erpm.frozen_features(net)(x / 255)), net(x / 255))
    with refuses("unknown head 'cleen'; did you mean 'clean'?"):
        erpm.frozen_features(s, "cleen")


# ---- rows: any network on any set ----

@pytest.fixture(scope="module")
def three_networks(tmp_path_factory):
    """A Student and a plain network of shapes, and a file of unknown origin; a set of four classes
    and one of two images; what one process makes of them."""
    cwd, net = tmp_path_factory.mktemp("any"), erpm.build("cifar:resnet8-s2", 10)
    saved(cwd / "p/model.safetensors", net)
    torch.save(net.net.state_dict(), cwd / "foreign.pth")
    saved(cwd / "s/model.safetensors", moved(erpm.Student(net, 2, 1, 0.2)))
    make_tree(cwd / "four", "abcd", n=6)
    make_tree(cwd / "two", n=1)
    words = ["eval", "--model", "run:s,P@run:p,cifar:resnet8-s2=foreign.pth", "--set",
             "shapes,shapes-r,4@folder:four,folder:two", "data.n_test=50", "data.n_train=100",
             "eval.batch=16", "eval.passes=2", "data.size_px=32", "runtime.amp=none"]
    with contextlib.chdir(cwd):
        torch.set_num_threads(1)
        runs(*words, "out=one")
    return cwd, words


def test_a_set_of_other_classes_is_probed(three_networks):
    rows = {(r["label"], r["set"]): r for r in untimed(three_networks[0] / "one/models")}
    assert len(rows) == len(untimed(three_networks[0] / "one/models")) == 12
    for (label, name), r in rows.items():
        own = name.startswith("shapes") and not label.startswith("cifar")
        assert label.endswith(", linear probe") != own
        if not label.startswith("cifar"):
            assert r["kind"] == {"shapes": "home", "shapes-r": "shift"}.get(name, "transfer")
    probe = rows["run:s, linear probe", "4"]
    assert "rules" not in probe and probe["passes"] is None and probe["n"] == 24
    assert rows["run:s", "shapes"]["rule"] == "product" and "sigma" in rows["run:s", "shapes"]
    assert {("P", "shapes"), ("run:s", "shapes-r"), ("P, linear probe", "folder:two")} < set(rows)


def test_1_2_and_3_processes_give_the_same_rows_to_the_last_digit(three_networks):
    cwd, words = three_networks
    for n in (2, 3):
        in_processes(n, cwd, *words, f"out={n}")
        assert {r["processes"] for r in result_rows(cwd / f"{n}/models")} == {n}
        assert untimed(cwd / f"{n}/models") == untimed(cwd / "one/models")


def test_an_interrupted_eval_goes_on_to_the_same_rows(three_networks, monkeypatch):
    cwd, words = three_networks
    monkeypatch.chdir(cwd)
    whole, calls = erpm.evaluate_all, []

    def some(*a, **kw):
        calls.append(a)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return whole(*a, **kw)

    monkeypatch.setattr(erpm, "evaluate_all", some)
    assert erpm.main([*words, "out=half"]) == 130
    file = cwd / "half/models/results.jsonl"
    file.write_text(file.read_text() + file.read_text()[:100])           # a row cut off by a crash
    runs(*words, "out=half")
    assert untimed(cwd / "half/models") == untimed(cwd / "one/models") and len(calls) == 13
    before = file.read_bytes()
    runs(*words, "out=half")                                   # a finished eval computes no figure
    assert len(calls) == 13 and file.read_bytes() == before


def test_other_weights_seed_transform_or_code_make_new_rows_and_nothing_else_does(
        three_networks, monkeypatch):
    cwd, _ = three_networks
    monkeypatch.chdir(cwd)
    net = saved(cwd / "q/model.safetensors", erpm.build("cifar:resnet8-s2", 10))
    one = ["eval", "--model", "run:q", "--set", "4@folder:four", "out=kept", "data.size_px=32"]

    def rows_after(*words):
        runs(*one, *words)
        rows = result_rows("kept/models")
        assert len({r["of"] for r in rows}) == len(rows)
        return len(rows)
    assert [rows_after(*w) for w in ([], [], ["eval.batch=7"], ["data.workers=1"])] == [1] * 4
    assert [rows_after(*w) for w in (["seed=1"], ["seed=1"], ["data.size_px=33"], ["data.n_test=9"],
                                     ["eval.rule=kl"], ["data.fit=squash"])] == [2, 2, 3, 4, 4, 5]
    with torch.no_grad():
        net.net[0][0].weight.mul_(1.1)
    saved(cwd / "q/model.safetensors", net)
    assert rows_after() == 6
    monkeypatch.setattr(erpm, "versions", lambda: {"erpm": "other"})
    assert rows_after() == 7


@pytest.mark.parametrize("home, name, classes, own", [
    ("shapes", "shapes-r", 10, True), ("shapes", "shapes", 10, True), ("", "shapes", 10, False),
    ("b@folder:b", "folder:c", 2, True), ("folder:b", "folder-c:b", 2, True),
    ("shapes", "folder:a", 10, False), ("cifar10", "shapes", 10, False),
    ("folder:b", "folder:d", 2, False)])
def test_a_network_answers_itself_on_its_own_classes_alone(here, home, name, classes, own):
    make_tree(here / "a", list(erpm.SHAPES)[::-1], n=1)          # sorted: other order
    make_tree(here / "b", n=1)
    make_tree(here / "c", n=1, splits=("",))
    make_tree(here / "d", ("cat", "emu"), n=1)
    cfg = erpm.resolve(["data.size_px=32", "data.n_test=4", "data.n_train=20"])
    net, s = erpm.build("cifar:resnet8-s2", classes), erpm.open_set(name, cfg.data)
    known = {"cifar10": tuple("0123456789"), "": ()}.get(home)
    if known is None:
        known, home = erpm.open_set(home, cfg.data).classes, home.rpartition("@")[2]
    net.card = dataclasses.replace(net.card, classes=known, home=home)
    label, answering = erpm.headed("x", net, name, s, cfg, {})
    assert label == ("x" if own else "x, linear probe") and (answering is net) == own
    kind = erpm.kind_of(net.card, s)
    assert kind == (("home" if name == home else "shift") if own else "transfer") or home == ""


def test_a_folder_of_the_same_classes_is_a_shift_and_another_is_transfer(three_networks, here):
    cwd, _ = three_networks
    make_tree(here / "styled", n=4, splits=("",))
    saved(here / "p/model.safetensors", erpm.build("cifar:resnet8-s2", 2), "folder:pets",
          classes=("cat", "dog"))
    runs("eval", "--model", "N@run:p", "--set",
         f"styled@folder:styled,styled@folder-c:styled,4@folder:{cwd}/four", "eval.n_cell=3")
    rows = result_rows("runs/models")
    found = {(r["label"], r["set"], r["kind"]) for r in rows}
    assert found == {("N", "styled", "shift"), ("N", "styled-c", "shift"),
                     ("N, linear probe", "4", "transfer")}
    assert len(rows) == 77 and {r["n"] for r in rows if r["corruption"]} == {3}


def test_a_network_that_has_other_classes_now_is_refused(three_networks, here, capsys):
    saved(here / "x/model.safetensors", erpm.build("cifar:resnet8-s2", 7))
    assert "has 7 classes and shapes needs 10" in fails(
        capsys, "eval", "--model", f"run:{here}/x", "--set", "shapes")
    make_tree(here / "flat", n=1, splits=("",))
    line = fails(capsys, "eval", "--model", f"run:{three_networks[0]}/p", "--set", "folder:flat")
    assert "its classes are not the network's outputs, and there are no training images" in line


def test_all_scores_what_is_there_and_refuses_what_is_half_there(three_networks, here, capsys):
    words = ["eval", "--model", f"cifar:resnet8-s2={three_networks[0]}/foreign.pth", "--set", "all",
             "data.n_test=10", "data.n_train=100"]
    out = runs(*words)
    rows = result_rows("runs/models")
    assert {r["set"] for r in rows} == {"shapes", "shapes-r", "shapes-c"} and len(rows) == 77
    assert all(f"left out: {n} is not there" in out for n in ("fashion-mnist", "imagenet-a"))
    make_tree(here / "data/imagenet-a", erpm.synsets("a")[:2], n=1, splits=("",))
    assert "imagenet-a: 2 images in data/imagenet-a, expected 7,500" in fails(capsys, *words)


def test_what_cannot_be_cut_has_no_probe_and_says_so(here, capsys):
    torch.save(erpm.build("torchvision:shufflenet_v2_x0_5", 3).net.state_dict(), "w.pth")
    name = "mine@torchvision:shufflenet_v2_x0_5=w.pth"
    out = runs("eval", "--model", name, "--set", "all", "data.n_test=10", "data.n_train=9")
    assert "shapes: mine needs a linear probe there" in out and "nothing to score" in out
    assert "mine needs a linear probe there" in fails(
        capsys, "eval", "--model", name, "--set", "shapes")


def test_weights_that_cannot_be_had_stop_the_loop_and_lose_nothing(three_networks, monkeypatch,
                                                                   capsys):
    monkeypatch.chdir(three_networks[0])

    def offline(*a, **kw):
        raise OSError("no network")
    monkeypatch.setattr("timm.create_model", offline)
    line = fails(capsys, "eval", "--model", "run:p,timm:resnet18.tv_in1k,run:s", "--set", "shapes",
                 "out=lost", "data.n_test=10")
    assert "timm:resnet18.tv_in1k: " in line and "what is scored is kept" in line
    assert [r["label"] for r in result_rows("lost/models")] == ["run:p"]


def test_a_network_sees_images_at_its_own_size_by_whatever_name_it_comes(here):
    saved(here / "runs/x/model.safetensors", erpm.build("cifar:resnet8-s2", 2), "folder:odd",
          classes=("cat", "dog"), view=erpm.View(32, 0.9, "bicubic"), label="net")
    (here / "runs/x/config.yaml").write_text("data: {name: 'folder:odd'}\nrun: x")
    make_tree(here / "odd", n=8, size=(41, 67))
    net = erpm.load("runs/x")
    want = erpm.evaluate(net, "folder:odd", amp="none")
    w = "runs/x/model.safetensors"
    runs("eval", "--run", "runs/x", "--set", "folder:odd", "runtime.amp=none")
    runs("eval", "--model", f"a@run:runs/x,b@cifar:resnet8-s2={w}", "--set", "folder:odd",
         "runtime.amp=none")
    rows = result_rows("runs/x") + result_rows("runs/models")
    assert [r["label"] for r in rows] == ["net", "a", "b"] and want["n"] == 16
    assert all({k: r[k] for k in want} == want and "32" in r["transform"] for r in rows)
    assert want == erpm.evaluate(erpm.build("run:runs/x"), "folder:odd", amp="none")
    assert erpm.build("cifar:resnet8-s2", None, w).card.view == net.card.view


# ---- zero-shot ----

def text_head(c=4, d=64, seed=0, bias=0.0):
    return erpm.TextHead(torch.randn(c, d, generator=erpm.rng("text", seed)), math.log(8.0), bias)


def test_a_text_head_is_the_scaled_cosine_and_trains_nothing():
    head, h = text_head(bias=-2.0), torch.randn(3, 64)
    want = [[8 * float(F.cosine_similarity(a, w, 0)) - 2 for w in head.weight] for a in h]
    assert torch.allclose(head(h), torch.tensor(want), atol=1e-5)
    assert not list(head.parameters()) and head.out_features == 4


def test_the_three_heads_tune_a_projection_each_and_share_the_text():
    net = erpm.Tower(tiny_net(64), text_head(), (0.0, None)).eval()
    s, x = erpm.Student(net, 2, 1, 0.02, dropout_in="head").eval(), images(6)
    assert all(torch.equal(z, net(x / 255)) for z in s(x))
    classifiers = [s.tuned.heads[h][-1] for h in erpm.HEADS]
    assert all(torch.equal(c.fc.weight, net.fc.weight) for c in classifiers)
    assert len({id(p) for c in classifiers for p in c.features.parameters()}) == 6
    f, ids = s.features(x), torch.tensor([[2, 2], [0, 3]])       # closed form of a text head
    for some in (None, ids):
        (m, sigma, z), (m0, sigma0, z0) = s.moments(f, 20000, some), s.moments(f, 0, some)
        assert torch.allclose(sigma, sigma0, rtol=0.05) and torch.allclose(m, m0, atol=5e-3)
        assert torch.allclose(z, z0, atol=0.05) and sigma.min() > 0


@pytest.mark.parametrize("kind", ["tiny", "tiny-rn", "tiny-timm", "erpm-tiny"])
def test_zero_shot_logits_equal_open_clips_own_path_and_new_classes_share_all(kind, tmp_path):
    import open_clip
    torch.manual_seed(0)
    file, clip = str(tmp_path / "clip.pt"), erpm.clip_model(kind)
    torch.save(clip.state_dict(), file)
    names, templates = ("star", "half disc", "{ring}"), open_clip.OPENAI_IMAGENET_TEMPLATES[:5]
    weight = open_clip.build_zero_shot_classifier(clip, open_clip.get_tokenizer(kind), names,
                                                  templates)
    net = erpm.build(f"open_clip:{kind}", names, file, templates=[t("{}") for t in templates])
    x = images(3, 40)
    with torch.no_grad():
        want = clip.logit_scale.exp() * clip.encode_image(net.prepare(x), normalize=True) @ weight
        want = want if clip.logit_bias is None else want + clip.logit_bias
        assert torch.allclose(net(x), want, rtol=0, atol=2e-6) and want.std() > 1e-3
        s = erpm.Student(net, 1, 1).eval()              # other memory: kernels may round otherwise
        assert torch.allclose(s(x).clean, net(x), rtol=0, atol=2e-6)
        for m in (net, s):
            other = erpm.zero_shot(m, (("ring", "star"), net.card.prompts[1]))
            assert {id(p) for p in other.parameters()} == {id(p) for p in m.parameters()}
            z, z0 = (n(x) if n is other and m is net or n is net else n(x).robust
                     for n in (other, m))
            assert z.shape == (3, 2) and torch.allclose(z[:, 1], z0[:, 0], atol=2e-6)
            assert m.card.n_classes == 3 and other.card.n_classes == 2


def test_prompts_come_from_imagenet_the_folder_names_or_a_file(tmp_path):
    import open_clip
    fish = ("n01443537", "n01440764")
    part = erpm.ImageSet("x", [0], fish, images=images(1), outputs=erpm.synsets())
    names, templates = erpm.prompts_of(part)
    assert list(names) == list(open_clip.IMAGENET_CLASSNAMES) and len(templates) == 80
    assert templates[3] == open_clip.OPENAI_IMAGENET_TEMPLATES[3]("{}")
    assert erpm.prompts_of(erpm.ImageSet("x", [0], fish))[0] == ("goldfish", "tench")
    own = erpm.ImageSet("z", [0, 1], ["polar_bear", "half-disc"], images=images(2))
    assert erpm.prompts_of(own) == (("polar bear", "half disc"), ("a photo of a {}.",))
    (tmp_path / "names.txt").write_text("thing 1\nthing_2\n")
    (tmp_path / "templates.txt").write_text("one {}\n\ntwo {}\n")
    got = erpm.prompts_of(own, str(tmp_path / "templates.txt"), str(tmp_path / "names.txt"))
    assert got == (("thing 1", "thing_2"), ("one {}", "two {}"))
    for text in ("no place\n", "", "{} and {}\n"):
        (tmp_path / "templates.txt").write_text(text)
        with refuses("model.templates: expected lines with one {}"):
            erpm.prompts_of(own, str(tmp_path / "templates.txt"))


CLIP = """model.head=text model.student=open_clip:erpm-tiny model.teacher=cifar:resnet8-s2
distill.tune=1 distill.head=1 data.n_train=300 data.n_test=40 pretrain.batch=50 robustify.batch=50
distill.batch=50 pretrain.epochs=1 robustify.epochs=1 distill.epochs=1 eval.batch=40 eval.passes=2
pretrain.n_images=0 robustify.n_images=0 distill.n_images=0 eval.n_cell=10 eval.sets=shapes,shapes-r
runtime.amp=none compare.rows=""".split()


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("clip")
    with contextlib.chdir(cwd):
        return cwd, runs("demo", "run=z", *CLIP)


def test_a_text_demo_scores_original_and_student_zero_shot(clip_run, monkeypatch):
    cwd, out = clip_run
    rows = {(r["label"], r["set"]): r for r in result_rows(cwd / "runs/z")}
    assert set(rows) == {(label, s) for s in ("shapes", "shapes-r") for label in (
        "original", "teacher", "ERPM", "original + teacher", "ERPM + teacher")}
    monkeypatch.chdir(cwd)
    before = (cwd / "runs/z/results.jsonl").read_bytes()
    runs("eval", "--run", "runs/z")
    assert (cwd / "runs/z/results.jsonl").read_bytes() == before
    s = erpm.load("runs/z")
    assert s.card.prompts[0] == tuple(erpm.SHAPES)
    found = erpm.evaluate(s, erpm.open_set("shapes", erpm.Data(n_test=40)), amp="none", passes=2,
                          batch=40)
    assert found["rules"] == rows["ERPM", "shapes"]["rules"]


def test_the_frozen_towers_are_equal_bit_for_bit_after_training(clip_run, monkeypatch):
    monkeypatch.chdir(clip_run[0])
    first, s, x = erpm.load("runs/z/student.safetensors"), erpm.load("runs/z"), images(4)
    before, _ = erpm.cut(first, 1)
    assert len(before.state_dict()) > 20 and equal(s.backbone, before)
    assert torch.equal(s.original(s.features(x)), first(x))
    assert torch.equal(s.original[-1].fc.weight, s.tuned.heads["robust"][-1].fc.weight)
    assert not torch.equal(s(x).clean, first(x))             # and the tuned part has moved


def test_a_student_names_new_classes_with_its_own_text_tower(clip_run, here, capsys):
    run = shutil.copytree(clip_run[0] / "runs/z", here / "moved")  # a run's folder may be moved
    make_tree(here / "pets", ("red_ring", "blue-arrow"), n=2, splits=("",))
    runs("eval", "--model", "S@run:moved", "--set", "pets@folder:pets", "data.size_px=32")
    assert [r["label"] for r in result_rows("runs/models")] == ["S, zero-shot"]
    towers = erpm.clip_model("erpm-tiny", str(run / "student.safetensors"))
    prompts = (("red ring", "blue arrow"), ("a photo of a {}.",))
    there = erpm.zero_shot(erpm.load(run), prompts)
    import open_clip
    texts = open_clip.get_tokenizer("erpm-tiny")(["a photo of a red ring.",
                                                  "a photo of a blue arrow."])
    want = towers.encode_text(texts, normalize=True)
    assert torch.allclose(there.original[-1].fc.weight, want, atol=1e-6)


def test_a_text_tower_runs_once_and_without_its_file_new_classes_are_refused(clip_run, tmp_path,
                                                                             monkeypatch):
    monkeypatch.chdir(clip_run[0])
    shutil.copytree("runs/z", tmp_path / "runs/z")
    monkeypatch.chdir(tmp_path)
    s, prompts = erpm.load("runs/z"), (("red ring", "arrow"), ("a {}.",))
    one = erpm.zero_shot(s, prompts, tmp_path / "text")
    with monkeypatch.context() as m:
        m.setattr(erpm, "clip_model", lambda *a: pytest.fail("the text tower ran again"))
        assert equal(erpm.zero_shot(s, prompts, tmp_path / "text"), one)
    Path("runs/z/student.safetensors").unlink()
    with refuses("put back the file that it was made from"):
        erpm.zero_shot(erpm.load("runs/z"), (("star", "sun"), ("a {}.",)))


def test_other_prompts_and_only_they_make_new_rows(clip_run, here):
    (here / "t.txt").write_text("a drawing of the {}\n")
    (here / "n.txt").write_text("\n".join(f"thing {k}" for k in range(10)))
    model = f"open_clip:erpm-tiny={clip_run[0] / 'runs/z/student.safetensors'}"
    for sets, words, n in (("shapes,shapes-r", [], 2), ("shapes-r,shapes", [], 2),
                           ("shapes", ["model.templates=t.txt"], 3), ("shapes", [], 3),
                           ("shapes", ["data.names=n.txt"], 4)):
        runs("eval", "--model", model, "--set", sets, "data.n_test=10", *words)
        rows = result_rows("runs/models")
        assert len(rows) == n == len({r["of"] for r in rows})
        assert {r["label"] for r in rows} == {model}


@pytest.mark.parametrize("command_", ["pretrain", "distill"])
def test_other_prompts_are_another_training(clip_run, here, capsys, command_):
    shutil.copytree(clip_run[0] / "runs", here / "runs")
    (here / "t.txt").write_text("a drawing of the {}\n")
    line = fails(capsys, command_, "run=z", *CLIP, "--recipe", "demo", "model.templates=t.txt")
    assert "made with other settings" in line


# ==== report ====

CELLS = [(c, k) for c in erpm.CORRUPTIONS for k in range(1, 6)]


def fake_row(name="shapes", cell=("", 0), seed=0, label="ERPM", right=6, n=10, **more):
    """A row of results.jsonl: of a Student where the label is ERPM, else of a plain network."""
    kind = "home" if name in ("shapes", "imagenet") else "shift"
    row = {"label": label, "of": f"{label} {seed} {name}", "seed": seed, "run": f"r{seed}",
           "set": name, "kind": kind, "corruption": cell[0], "severity": cell[1], "n": n,
           "transform": "32 px", "rule": "", "train": {"images": 100, "seconds": 1.0 + seed},
           "images_per_s": 7.0, "seconds": 2.0}
    found = {"correct": right, "correct5": n - 1, "nll": 1.25, "ece": 0.125}
    if label != "ERPM":
        return row | found | more
    rules = {r: found | {"correct": right + (r == "robust"), "heads": [6, 0, 4]}
             for r in (*erpm.RULES, "product (closed form)")}
    rules["clean"]["heads"], rules["robust"]["heads"] = [n, 0, 0], [0, 0, n]
    return row | {"rule": "product", "rules": rules, "sigma": [0.25, 0.5], "kl": [1.5, 0.75]} | more


def fake_rows(seeds=(0, 1), label="ERPM", **more):
    return [fake_row(name, cell, s, label, **{"right": 5 + s} | more) for s in seeds
            for name, cells in (("shapes", [("", 0)]), ("shapes-c", CELLS)) for cell in cells]


def lines_of(rows, title):
    """{heading: cells} of a table of the report."""
    after = erpm.report_text(rows).split(f"\n## {title}\n")[1].split("\n## ")[0]
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in after.splitlines()
             if line.startswith("| ") and not line.startswith("| -")]
    return {heading: rest for heading, *rest in cells}


def test_report_gives_mean_and_spread_over_seeds():
    assert lines_of(fake_rows(), "Models")["ERPM"][:3] == ["55.00 ± 7.07"] * 2 + ["15.00 ± 7.07"]
    assert lines_of(fake_rows((0,)), "Models")["ERPM"][:3] == ["50.00", "50.00", "10.00"]


@pytest.mark.parametrize("lost", [("shapes-c", "fog", 3, 1), ("shapes-c", None, None, 1)])
def test_what_misses_a_cell_or_a_seed_is_missing_and_never_a_smaller_mean(lost):
    rows = [r for r in fake_rows() if not all(b in (None, a) for a, b in zip(
        (r["set"], r["corruption"], r["severity"], r["seed"]), lost))]
    assert lines_of(rows, "Models")["ERPM"][:2] == ["55.00 ± 7.07", "missing"]
    assert lines_of(rows, "shapes-c by corruption (mean of 5 severities)")["fog"] == ["missing"]


def test_evaluations_never_mix_and_the_larger_one_counts_then_the_newer():
    old = fake_rows((0,), "x")
    new = [r | {"of": "new", "correct": 9} for r in old]
    small = [r | {"of": "small", "correct": 1, "n": 5} for r in old]
    assert lines_of(old + new, "Models")["x"][:2] == ["90.00", "90.00"]
    assert lines_of(old + new[:40], "Models")["x"][:2] == ["90.00", "missing"]
    assert lines_of(old + small, "Models")["x"][:2] == ["50.00", "50.00"]
    with pytest.raises(erpm.UserError, match="r0 and other both hold x of seed 0: .* nothing"):
        erpm.report_text([*old, old[0] | {"run": "other"}])


def test_mce_is_that_worked_by_hand_and_alexnets_is_100():
    alexnet = list(erpm.ALEXNET.values())
    assert sum(alexnet) / 15 == pytest.approx(0.789, abs=5e-4)
    for more in (0, 0.05):
        rows = [fake_row("imagenet-c", (c, k), 0, "x", round(1e6 * (1 - erpm.ALEXNET[c] - more)),
                         10 ** 6) for c, k in CELLS]
        shifts = lines_of(rows, "Distribution shifts")
        mce, by_hand = shifts["x"][shifts[""].index("mCE")], sum(1 + more / a for a in alexnet) / 15
        assert float(mce) == pytest.approx(100 * by_hand, abs=0.01)
        share = lines_of(rows, "imagenet-c: error relative to AlexNet's")["fog"][0]
        assert float(share) == pytest.approx(100 + 100 * more / 0.819324, abs=0.01)


def test_rules_and_routing_are_averaged_over_the_shifts():
    rows = fake_rows((0,), right=6) + [fake_row("shapes-r", right=2)]
    rules = lines_of(rows, "ERPM: which rule picks the head")
    assert rules[""] == ["shapes", "mean of 2 shifts", "shapes-c", "shapes-r", "F shapes",
                         "F mean of 2 shifts"]
    assert rules["kl"] == ["60.00", "40.00", "60.00", "20.00", "60.00", "40.00"]
    assert rules["always robust"] == ["70.00", "50.00", "70.00", "30.00", "0.00", "100.00"]
    assert rules["perfect routing"] == ["60.00", "50.00", "70.00", "30.00", "100.00", "100.00"]
    assert {"either head right", "product (closed form)"} < set(rules)


def test_every_measure_stands_in_the_report():
    rows = fake_rows((0,), right=6)
    assert lines_of(rows, "Every model on every set")["ERPM on shapes"] == [
        "60.00", "90.00", "1.250", "12.50", "7", "10"]
    assert lines_of(rows, "ERPM: the heads (product)")["shapes-c, severity 3"] == [
        "60.00", "0.00", "40.00", "40.00", "0.2500", "0.5000", "1.5000", "0.7500"]
    assert lines_of(rows, f"{erpm.APPENDIX}shapes-c, ERPM")["fog"] == ["60.00"] * 5
    assert "- shapes-c: 75 cells of 10 images, 32 px" in erpm.report_text(rows)
    train = {"images": 100, "seconds": 1.0, "gflops": 0.5}
    row, *_ = erpm.relative([fake_row("imagenet-c", ("fog", 1), label=x, gflops=3.0, train=train)
                             for x in ("ERPM", "FT", "original")])
    assert not [m for m in erpm.MEASURES if np.isnan(erpm.measured(row, None, m))]


def test_other_classes_and_qualified_names_are_other_columns():
    made = [r | {"set": "shapes-c (regenerated)", "correct": 2}
            for r in fake_rows((0,), "x") if r["corruption"]]
    rows = [*fake_rows((0,), "x"), *made,
            fake_row(label="clip, zero-shot", kind="transfer"),
            fake_row("sun397", label="clip, zero-shot", right=7, kind="transfer"),
            fake_row("flowers102", label="x, linear probe", right=8, kind="transfer")]
    rows = [r | {"set": r["set"] + " (10 of 20 images)"} if r["set"] == "shapes" else r
            for r in rows]
    assert lines_of(rows, "Transfer") == {
        "": ["sun397", "flowers102"], "clip, zero-shot": ["70.00", "missing"],
        "x, linear probe": ["missing", "80.00"]}
    models = lines_of(rows, "Models")
    assert models[""][:3] == ["shapes (10 of 20 images)", "shapes-c", "shapes-c (regenerated)"]
    assert models["x"][:3] == ["50.00", "50.00", "20.00"]
    assert models["clip, zero-shot"][:2] == ["60.00", "missing"]
    steps = lines_of(rows, "shapes-c (regenerated) by severity (mean of 15 corruptions)")
    assert steps["0 (clean)"] == ["50.00"] and steps["5"] == ["20.00"]


def test_published_figures_and_clean_images_of_the_same_classes_stand_beside_ours():
    rows = [fake_row(s, label="x") for s in ("imagenet", "imagenet-r", "imagenet-a")] + [
        fake_row("imagenet@a", label="x", right=9, kind="part"),
        *[fake_row("imagenet-c", cell, label="x") for cell in CELLS]]
    shifts = lines_of(rows, "Distribution shifts")
    assert list(zip(shifts[""], shifts["timm:resnet50.tv_in1k (published)"])) == [
        ("imagenet", "76.13"), ("mean of 3 shifts", "-"), ("imagenet-c", "-"),
        ("imagenet-a", "0.00"), ("imagenet-r", "36.17"), ("mCE", "76.70")]
    assert "No result for imagenet-v2, imagenet-sketch, obj" in erpm.report_text(rows)
    assert "published" not in erpm.report_text(fake_rows())
    assert lines_of(rows, "The same classes, clean and shifted") == {
        "": ["imagenet@a", "imagenet-a"], "x": ["90.00", "60.00"]}


def test_figures_show_the_numbers_of_the_tables_and_methods_keep_their_looks(monkeypatch):
    rows = fake_rows() + fake_rows(label="net") + fake_rows(label="original", train={})
    drawn = erpm.figures(rows)
    for figure in drawn.values():
        figure.draw_without_rendering()
    line = drawn["severity.png"].axes[0].lines[0]
    steps = lines_of(rows, "shapes-c by severity (mean of 15 corruptions)")
    assert [f"{y:.2f}" for y in line.get_ydata()] == [v[0][:5] for k, v in steps.items() if k]
    points = [c.lines[0] for c in drawn["pareto.png"].axes[0].containers]
    assert [list(p.get_ydata()) for p in points] == [[pytest.approx(55)]] * 2
    assert line.get_color() == points[0].get_color() == erpm.STYLES["ERPM"][0]
    assert erpm.styles(rows)["net"]["linestyle"] == "--" and not erpm.figures(rows[:1])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError):
        erpm.figures(rows)


def test_the_pareto_front_holds_what_nothing_beats():
    points = [(1, 5), (2, 4), (2, 7), (3, 7), (4, 9), (1, 3)]
    assert erpm.pareto_front(points) == [(1, 5), (2, 7), (4, 9)]


def test_the_picture_grid_is_as_wide_as_the_longest_class_name():
    student, mean = types.SimpleNamespace(), torch.eye(3).expand(8, 3, 3)
    student.features = lambda x: x
    student.moments = lambda f, passes: (mean, torch.ones(8, 2), mean)
    student.pick_head = erpm.select
    pictures = {"shapes": (torch.zeros(9, 3, 8, 8, dtype=torch.uint8), torch.zeros(9).long())}
    short, wide = [erpm.picture_grid(student, pictures, ("a", "b", name), 2, "kl")
                   for name in ("c", "a long name of a class" * 3)]
    assert wide.width > short.width + 8 * 200 and wide.height == short.height
    assert {(0, 100, 0), (178, 34, 34)} < {c for _, c in short.getcolors(10 ** 6)}


# ==== commands ====

LEFT = {"student.safetensors", "teacher.safetensors", "model.safetensors", "team.safetensors",
        "lp.safetensors", "log.jsonl", "config.yaml", "results.jsonl", "report.md", "pictures.png"}
DEMO = [*TINY, "data.n_train=300", "data.n_test=30", "eval.n_cell=10", "distill.epochs=1",
        "compare.rows=LP: distill.method=lp\nERPM:\nTeam: distill.method=team"]
SHORT = [*TINY, "data.n_train=100", "data.n_test=20", "pretrain.epochs=0.5", "distill.epochs=0.5"]
FOLDER = [*TINY, "data.name=folder:set", "data.size_px=32", "data.n_train=0"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        return cwd, runs("demo", *DEMO)


@pytest.fixture
def run_of_demo(demo, here):
    """The demo's run in a new working directory."""
    return Path(shutil.copytree(demo[0] / "runs/demo", here / "runs/demo"))


def test_demo_leaves_everything_it_promises(demo, run_of_demo):
    run, rows = run_of_demo, result_rows(run_of_demo)
    assert LEFT <= {p.name for p in run.iterdir()} and not list(run.glob("*.ckpt"))
    made = ("original", "teacher", "LP", "ERPM", "Team")
    teams = ("original + teacher", "LP + teacher", "ERPM + teacher")
    assert len(rows) == 8 * 77 and {r["set"] for r in rows} == {"shapes", "shapes-c", "shapes-r"}
    assert {r["label"] for r in rows} == {*made, *teams}
    for label in made:                                           # validated after every stage
        told = re.findall(rf"^{label}: ([\d.]+) % of 30 test images right", demo[1], re.M)
        clean = next(r for r in rows if (r["label"], r["set"]) == (label, "shapes"))
        clean = clean["rules"][clean["rule"]] if "rules" in clean else clean
        assert set(told) == {f"{100 * clean['correct'] / 30:.1f}"}
    assert erpm.resolve(run=run) == erpm.configure(erpm.parse(["demo", *DEMO]))


def test_a_second_demo_computes_nothing_again_and_other_settings_do_not_overwrite_it(
        run_of_demo, monkeypatch, capsys):
    before = {p.name: p.read_bytes() for p in run_of_demo.iterdir() if p.suffix != ".md"}
    for name in ("fit", "evaluate_all", "figures", "pictures_of"):
        monkeypatch.setattr(erpm, name, lambda *a, **kw: {})
    monkeypatch.setattr(erpm, "validate", lambda *a, **kw: 0.5)
    assert runs("demo", *DEMO).count("is there, kept") >= 5
    for stage, old in (("pretrain", 0.003), ("robustify", 0.003), ("distill", 0.002)):
        line = fails(capsys, stage, "--recipe", "demo", *DEMO, f"{stage}.lr=0.5")
        assert f"made with other settings ({stage}.lr: {old} -> 0.5)" in line
    assert all((run_of_demo / name).read_bytes() == old for name, old in before.items())


@pytest.mark.parametrize("tune, same", [(0, 4), (2, 2), (-1, 0)])
def test_pretrain_trains_the_last_stages_alone_and_with_tune_0_a_linear_probe(here, tune, same):
    net = saved(here / "w.safetensors", erpm.build("cifar:resnet8-s2", 10), "cifar10",
                classes=tuple("0123456789"))         # as many classes, but not those of the set
    out = runs("pretrain", *SHORT, f"pretrain.tune={tune}", "model.student_weights=w.safetensors")
    made = erpm.load("runs/shapes/student.safetensors")
    assert "has no classifier for these 10 classes" in out
    assert [equal(a, b) for a, b in zip(net.net[:4], made.net)] == [k < same for k in range(4)]
    if tune == 0:
        s = erpm.open_set("shapes", erpm.Data(n_train=100), "train")
        with torch.no_grad():
            x, y = erpm.frozen_features(net)(s.images[s.index]), torch.from_numpy(s.y[s.index])
        assert torch.allclose(erpm.linear_probe(x, y, 10)[0], made.net[-1].weight, atol=1e-5)


def test_local_weights_start_both_networks_and_none_takes_the_teacher_as_it_is(here, capsys):
    for name, classes in (("ten", 10), ("seven", 7)):
        erpm.save(here / f"{name}.safetensors", erpm.build("cifar:resnet8-s2", classes))
    words = [*SHORT, "model.student_weights=ten.safetensors", "robustify.method=none"]
    out = runs("distill", *words, "model.teacher_weights=ten.safetensors")
    ten, s = erpm.load("ten.safetensors"), erpm.load("runs/shapes")
    assert "has no classifier" not in out
    assert equal(erpm.load("runs/shapes/teacher.safetensors"), ten)
    assert torch.equal(s.original(s.features(images(3))), ten(images(3)))
    assert "has no trained classifier for these 10 classes" in fails(
        capsys, "robustify", "run=c", *words, "model.teacher_weights=seven.safetensors")


def test_a_foreign_file_answers_with_its_own_head_where_its_user_says_so(here):
    make_tree(here / "pets", n=3)
    torch.save(erpm.build("cifar:resnet8-s2", 2).net.state_dict(), "w.pth")
    runs("eval", "--model", "N@cifar:resnet8-s2=w.pth", "--set", "pets@folder:pets",
         "eval.head=own")
    assert [(r["label"], r["set"]) for r in result_rows("runs/models")] == [("N", "pets")]


def tuned(run, *words):
    (run / "model.safetensors").unlink()
    runs("distill", "--recipe", "demo", *DEMO, "distill.epochs=0.2", *words)
    return erpm.load(run)


@pytest.mark.parametrize("method, first", [("apt", 2), ("lp", 6), ("ft", 0), ("lp-ft", 0)])
def test_baselines_train_their_part_alone(run_of_demo, method, first, monkeypatch):
    monkeypatch.setattr(erpm, "validate", lambda *a: 0.5)
    (run_of_demo / "lp.safetensors").unlink()
    net = tuned(run_of_demo, f"distill.method={method}")
    before = erpm.load(run_of_demo / "student.safetensors")
    moved_ = [not equal(a, b) for a, b in zip(net.net, before.net)]
    assert moved_ == [k >= first and bool(list(m.parameters())) for k, m in enumerate(net.net)]
    assert net.card.label == method.upper() and net.card.train["images"] > 0


def test_wise_ends_at_the_original_and_at_ft_exactly(run_of_demo):
    for alpha, same in ((0, "student"), (1, "ft")):
        wise = tuned(run_of_demo, "distill.method=wise", f"distill.wise={alpha}")
        assert equal(wise, erpm.load(run_of_demo / f"{same}.safetensors"))


def test_a_team_is_the_original_a_tail_of_its_own_and_the_teacher(run_of_demo):
    both, original, teacher = (erpm.load(run_of_demo / f"{name}.safetensors")
                               for name in ("team", "student", "teacher"))
    x = images(4)
    clean, robust = both.net(x)
    assert equal(both.teacher, teacher) and torch.equal(clean, original(x))
    said = erpm.team(clean.softmax(1), [robust.softmax(1), teacher(x).softmax(1)])
    assert not torch.equal(clean, robust) and torch.equal(both(x), said.clamp_min(erpm.TINY).log())


def test_the_clean_member_of_a_team_is_heard_unless_the_others_contradict_it():
    g = erpm.rng("team")
    c, a, b = (torch.randn(50, 7, generator=g).mul(3).softmax(1) for _ in range(3))
    for i, p in enumerate(erpm.team(c, [a, b])):
        r = [(u + v) / 2 for u, v in zip(a[i].tolist(), b[i].tolist())]
        w = math.exp(-2 * sum(u * math.log(u / v) for u, v in zip(c[i].tolist(), r)))
        want = [w * u + (1 - w) * v for u, v in zip(c[i].tolist(), r)]
        assert p.tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "open_clip:tiny"])
@pytest.mark.parametrize("deep", [True, False])
def test_prompts_are_seen_and_none_of_them_are_the_network(name, deep):
    x, nets = images(2).float() / 255, [erpm.build(name, 5, "random", size_px=32) for _ in "abc"]
    net, none, some = nets[0], erpm.prompted(nets[1], 0, deep), erpm.prompted(nets[2], 3, deep)
    state = {re.sub(r"(blocks\.\d+)", r"\1.block", k): v for k, v in net.state_dict().items()}
    for other in (none, some):
        missing, unexpected = other.load_state_dict(state, strict=False)
        assert all(k.endswith("prompt") for k in missing) and not unexpected
    assert torch.equal(none(x), net(x)) and not torch.allclose(some(x), net(x), atol=1e-5)
    assert torch.equal(erpm.stages(some)(x), some(x))
    blocks = [m for m in some.modules() if isinstance(m, erpm.Prompted)]
    assert sum(len(m.prompt) > 0 for m in blocks) == (len(blocks) if deep else 1)


def test_vpt_trains_prompts_and_classifier_alone(here):
    runs("distill", *SHORT, "model.student=timm:test_vit", "data.size_px=32", "distill.method=vpt")
    made, before = erpm.load("runs/shapes"), erpm.load("runs/shapes/student.safetensors")
    theirs = {k.replace(".block.", "."): v for k, v in made.state_dict().items()}
    assert {k for k, v in before.state_dict().items() if not torch.equal(v, theirs[k])} == {
        "net.head.weight", "net.head.bias"}


def test_gflops_are_those_of_the_shapes():
    net, convs = erpm.build("cifar:resnet8-s2", 10), []
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.register_forward_hook(lambda m, _, y: convs.append(
                2 * m.weight.numel() * (y[0, 0].numel() if y.ndim > 2 else 1)))
    net(images(1))
    want, student = sum(convs) / 1e9, erpm.Student(net, 2, 1)
    assert erpm.gflops(net, 32) == pytest.approx(want, abs=1e-6)
    assert want < erpm.gflops(student, 32) < erpm.gflops(student, 32, 9)


def test_compare_makes_every_row_of_every_seed_once_and_prints_its_tables(here, monkeypatch):
    monkeypatch.setattr(erpm, "CHECKS", [None, ("contrast", 1)])
    monkeypatch.setattr(erpm, "figures", lambda rows: {})
    words = ["compare", "run=c", *SHORT, "eval.sets=shapes", "compare.seeds=2",
             "compare.rows=# Methods; as known\nLP: distill.method=lp\nERPM:\n# Teachers\nERPM:\n"
             "Other: robustify.augment=augmix"]
    out = runs(*words)
    files = {"student", "teacher", "teacher-augment-augmix", "lp", "model", "other"}
    for run in (here / "runs/c", here / "runs/c-s1"):
        assert {p.stem for p in run.glob("*.safetensors")} == files
        assert erpm.resolve(run=run).distill.method == "erpm"
        assert {"LP", "Other", "ERPM + teacher"} <= {r["label"] for r in result_rows(run)}
    table = out.split("## Teachers")[1].split("##")[0]
    assert "as known" in out and "| Other" in table and "| LP" not in table and " ± " in table
    assert runs(*words).count("is there, kept") >= 12


def test_torchrun_trains_one_model_on_two_processes(here):
    make_tree(here / "set", n=50)
    words = ["pretrain", "run=x", *FOLDER, "pretrain.epochs=2"]
    if SLOW:
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                        "--nproc-per-node", "2", str(HERE / "erpm.py"), *words], check=True)
    else:
        in_processes(2, here, *words)
    lines = [json.loads(t) for t in (here / "runs/x/log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines] == [2, 3, 4]                # written by one process alone
    assert erpm.load("runs/x/student.safetensors").card.train["images"] == 200


def test_sigkill_in_the_middle_of_an_epoch_changes_no_bit(demo, run_of_demo, monkeypatch):
    words, keep = ["distill", "--recipe", "demo", *DEMO], erpm.keep
    (run_of_demo / "model.safetensors").unlink()

    def killed(*a):
        keep(*a)
        os.kill(os.getpid(), signal.SIGKILL)
    with monkeypatch.context() as patch:
        patch.setattr(erpm, "keep", killed)
        job = forked(erpm.main, words)
        job.join(100)
    assert job.exitcode == -signal.SIGKILL and not (run_of_demo / "model.safetensors").exists()
    assert "goes on at step 3" in runs(*words)
    assert equal(erpm.load(run_of_demo), erpm.load(demo[0] / "runs/demo"))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_group_stops_cleanly_with_its_own_exit_code(here, number, code):
    make_tree(here / "set", n=40)

    def work():
        os.setsid()
        sys.stderr = open("err", "w", buffering=1)
        return erpm.main(["pretrain", "run=x", *FOLDER, "data.workers=2", "pretrain.epochs=400"])
    job, log = forked(work), here / "runs/x/log.jsonl"
    while job.is_alive() and not (log.is_file() and log.read_text()):
        time.sleep(0.01)
    os.killpg(job.pid, number)
    job.join(60)
    assert job.exitcode == code and Path("runs/x/student.ckpt").is_file()
    assert re.fullmatch(r"erpm.py: .*goes on from here\n", Path("err").read_text())


@pytest.mark.parametrize("words, says", [
    (["eval", "--set", "imagenet-rr"], "unknown set 'imagenet-rr'; did you mean 'imagenet-r'?"),
    (["eval", "--model", "timm:resnet18.foo"], "unknown network of timm"),
    (["eval", "--set", "imagenet-r", "--model", "run:r"], "looked for data/imagenet-r; expec"),
    (["eval", "--set", "folder:in", "--model", "run:r", "data.workers=1"], "image in/dog/0.png"),
    (["eval", "--run", "r,b"], "no run r,b: it has no config.yaml"),
    (["eval", "eval.rule=products"], "unknown rule 'products'; did you mean"),
    (["eval", "--set", "shapes"], "no trained network in runs/shapes"),
    (["distill", "model.teacher=timm:resnet50.foo"], "unknown network of timm 'resnet50.foo'"),
    (["distill", "distill.tune=99"], "tune = 99"), (["distill", "eval.sets=shape"], "'shapes'?"),
    (["distill", "model.student_weights=none.safetensors"], "no file none.safetensors"),
    (["distill", "data.name=imagenet-r"], "has no training split"),
    (["pretrain", "pretrain.batch=700"], "600 training images are fewer than a batch of 700"),
    (["distill", "model.head=text", "model.templates=no.txt"], "model.templates: cannot read no.t"),
    (["compare", "compare.rows=A: distill.methd=lp"], "compare.rows: A: 'distill.methd'; did you"),
    (["compare", "compare.rows=A: distill.method=lp model.head=text"], "no linear layer to train"),
    (["report"], "no results in runs/shapes"), (["bench", "speed"], "unknown bench 'speed'"),
    (["corrupt", "in"], "takes two folders"), (["corrupt", "none", "out"], "no image below none"),
    (["corrupt", "in", "in/out"], "lies in")])
def test_a_mistake_on_the_command_line_is_one_line_and_code_2(words, says, here, capsys):
    make_tree(here / "in", n=1, splits=("",))
    (here / "in/dog/0.png").write_bytes(b"no picture")
    saved(here / "r/model.safetensors", erpm.build("cifar:resnet8-s2", 2), "folder:in")
    line = fails(capsys, *words, *[t for t in TINY if words[0] in ("distill", "pretrain")
                                   and t.split("=")[0] not in str(words)])
    assert says in line and not (here / "data").exists()


def test_corrupt_writes_the_benchmark_tree_and_goes_on(here):
    make_tree(here / "in", n=2, splits=("",))
    words = ["corrupt", "in", "out", "data.size_px=32", "data.workers=2"]
    runs(*words)
    gone, kept = here / "out/fog/2/dog/1.png", here / "out/snow/3/cat/1.png"
    assert len(list(here.glob("out/*/*/*/*.png"))) == 75 * 4 and kept.is_file()
    x, _, index = erpm.open_set("folder:in", erpm.Data(size_px=32)).__getitems__([(0, 3)])
    want = erpm.corrupt(x, "fog", 2, index=index.tolist())[0].permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(Image.open(gone)), want)
    gone.unlink()
    kept.write_bytes(b"kept")
    runs(*words)
    assert gone.is_file() and kept.read_bytes() == b"kept"


def test_bench_pairs_the_same_work():
    calls = []
    row = erpm.paired(lambda: calls.append("a"), lambda: calls.append("b"), 10, 10, 3)
    assert calls == ["a", "b"] * 4 and row["spread"][0] <= row["ratio"] <= row["spread"][1]
    assert len(erpm.bench_corruptions(size=32, n=2)) == 17
    assert len(erpm.bench_augment(size=32, n=2)) == 3


# ==== nothing lost, nothing silently wrong ====

@pytest.fixture(scope="module")
def left_behind(tmp_path_factory):
    """A run's folder with a file of every kind."""
    top = tmp_path_factory.mktemp("left")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(top)
        runs("distill", *CACHED, "eval.sets=shapes")
        runs("eval", "--run", "runs/c", "--set", "shapes")
    for step in (3, 6):
        erpm.keep(top / "runs/c/t.ckpt", {"model": seeded_net()}, step, 1.0, {})
    return top / "runs/c"


def checkpoint_of(run):
    net = seeded_net()
    return erpm.resume(run / "t.ckpt", {"model": net}, {})[0], erpm.weights_sha(net)


READ = {"t.ckpt": checkpoint_of,
        "config.yaml": lambda run: erpm.flat(erpm.resolve(run=run)),
        "results.jsonl": lambda run: erpm.read_rows(run),
        "model.safetensors": lambda run: erpm.weights_sha(erpm.load(run))}


@pytest.mark.parametrize("file", READ)
def test_no_flipped_bit_and_no_cut_is_taken_for_the_file(left_behind, file):
    run, whole = left_behind, (left_behind / file).read_bytes()
    want, random = READ[file](run), np.random.default_rng(0)
    for k in range(60 if SLOW else 16):
        part, at = bytearray(whole), random.integers(len(whole))
        if k % 2:
            part[at] ^= 1 << int(random.integers(8))
        else:
            del part[at:]
        (run / file).write_bytes(part)
        with contextlib.suppress(erpm.UserError):    # refused; else the checkpoint before this
            got = READ[file](run)                    # one, or fewer rows, or the same
            older = file == "t.ckpt" and got == (3, want[1])
            fewer = file == "results.jsonl" and all(r in want for r in got)
            assert older or fewer or got == want and k % 2, (k, got)
    (run / file).write_bytes(whole)


def test_a_damaged_row_is_computed_again(left_behind):
    run = left_behind
    whole, kept = (run / "results.jsonl").read_text(), ("of", "rules", "correct", "n")
    before = [[r.get(k) for k in kept] for r in result_rows(run)]
    (run / "results.jsonl").write_text("{\n" + whole.replace('"n": 60', '"n": 61', 1))
    out = runs("eval", "--run", run, "--set", "shapes")
    assert "row 1 is damaged: eval makes it again" in out and "line 1: not JSON" in out
    again = [[r.get(k) for k in kept] for r in erpm.read_rows(run)]
    assert sorted(map(str, again)) == sorted(map(str, before))
    (run / "results.jsonl").write_text(whole)


def test_a_damaged_cache_is_refused(left_behind, capsys, monkeypatch):
    monkeypatch.chdir(left_behind.parents[1])
    [file] = left_behind.glob("views-*.bin")
    file.write_bytes(file.read_bytes()[:-2] + b"??")
    (left_behind / "model.safetensors").unlink()
    assert "is damaged: delete it" in fails(capsys, "distill", *CACHED)


def test_16_bit_pictures_are_scaled_and_others_without_a_range_refused(tmp_path):
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for name, kind in (("a.png", np.uint16), ("b.tiff", np.int32), ("c.tiff", np.float32)):
        Image.fromarray(grey.astype(kind)).save(tmp_path / name)
    for name in ("a.png", "b.tiff"):
        got = np.asarray(erpm.read_picture(tmp_path / name))
        assert np.abs(got[..., 0] - grey / 257.0).max() <= 0.51 and got.shape == (8, 8, 3)
    with refuses("has no known range"):
        erpm.read_picture(tmp_path / "c.tiff")


def test_linked_folders_are_entered_and_a_loop_of_links_is_an_error(tmp_path):
    make_tree(tmp_path, ("a",), 1, ("",))
    (tmp_path / "b").symlink_to(tmp_path / "a")
    paths, y = erpm.read_tree(tmp_path, {"a": 0, "b": 1})
    assert paths == [f"{tmp_path}/a/0.png", f"{tmp_path}/b/0.png"] and y == [0, 1]
    (tmp_path / "a/loop").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="symbolic links"):
        erpm.read_tree(tmp_path, {"a": 0})


def test_one_command_at_a_time_works_in_a_run(here, capsys):
    with erpm.alone(erpm.Config(run="x")):
        assert "another command is at work there" in fails(capsys, "pretrain", *TINY, "run=x")


def test_processes_with_other_settings_say_so_at_once(here):
    def work(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                       "MASTER_ADDR": "localhost", "MASTER_PORT": "29871"}
        with contextlib.redirect_stderr(open(f"err{rank}", "w")):
            return erpm.main(["pretrain", *TINY, f"pretrain.lr=1e-{3 + rank}"]) - 2
    fork_all(2, work)
    assert "were started with different settings" in Path("err0").read_text()


# ==== the cache of frozen views ====

CACHED = [*TINY, "run=c", "distill.views=2", "distill.epochs=3", "distill.batch=20",
          "distill.n_images=50", "pretrain.epochs=0.1", "robustify.epochs=0.1"]


@pytest.mark.parametrize("method", ["erpm", *["apt", "team"] * SLOW])
def test_training_from_the_cache_equals_training_on_the_same_views(here, monkeypatch, method):
    runs("distill", *CACHED, f"distill.method={method}")
    calls, kept = [], erpm.load("runs/c").state_dict()
    real = erpm.cached

    def uncached(cfg, images, see, *frozen):
        images = images.training(erpm.fold(cfg.seed, "distill"), cfg.data.crop, cfg.data.flip)
        place = {int(i): k for k, i in enumerate(images.index)}

        def live(batch):
            found = []
            for _, epoch, i in batch.keys:               # the chunk of 20 in which it was computed
                at = place[i] // 20 * 20
                keys = [(epoch % 2, k) for k in range(at, min(at + 20, 50))]
                x, y, _ = images.__getitems__(keys)
                parts = see(erpm.Batch(x, y, erpm.rng("view", cfg.seed, keys)))
                found.append([v[place[i] - at] for v in parts])
            calls.append(len(found))
            return [torch.stack(v) for v in zip(*found)]
        return images, live
    monkeypatch.setattr(erpm, "cached", uncached)
    os.unlink("runs/c/model.safetensors")
    runs("distill", *CACHED, f"distill.method={method}")
    assert calls and real is not uncached
    for k, v in erpm.load("runs/c").state_dict().items():
        assert torch.equal(v, kept[k]), k


def test_the_cache_is_filled_once_and_goes_on_where_it_was(here, monkeypatch):
    runs("distill", *CACHED)
    [file], size = Path("runs/c").glob("views-*.bin"), erpm.resolve(CACHED).distill.views * 50
    whole = file.read_bytes()
    rows = torch.from_file(str(file), shared=True, size=len(whole) // 4).view(size, -1)
    assert (rows[:, -1] == 1).all()
    rows[30:70] = 0
    del rows
    file.with_suffix(".sha").unlink()                    # as a process that was killed leaves it
    os.unlink("runs/c/model.safetensors")
    assert "views" in runs("distill", *CACHED) and file.read_bytes() == whole
    seen, harden = [], erpm.harden
    monkeypatch.setattr(erpm, "harden", lambda x, *a: seen.append(len(x)) or harden(x, *a))
    os.unlink("runs/c/model.safetensors")
    runs("distill", *CACHED, "distill.lr=1e-3")
    assert seen == [1] and file.read_bytes() == whole       # the one that shapes are asked of
    assert len(list(Path("runs/c").glob("views-*.bin"))) == 1


def test_two_processes_fill_one_cache(here):
    runs("distill", *CACHED)
    [file] = Path("runs/c").glob("views-*.bin")
    whole = file.read_bytes()
    os.unlink(file)
    os.unlink("runs/c/model.safetensors")
    in_processes(2, here, "distill", *CACHED)
    assert file.read_bytes() == whole


def test_a_cache_that_does_not_fit_the_disk_is_refused(here, capsys, monkeypatch):
    runs("pretrain", *CACHED)
    monkeypatch.setattr(erpm.shutil, "disk_usage", lambda p: types.SimpleNamespace(free=1000))
    assert "GB, more than is free there" in fails(capsys, "distill", *CACHED)


# ==== discrete adversarial distillation ====

SMALL_VQGAN = dict(n_embed=64, embed_dim=4, z_channels=8, ch=32, ch_mult=(1, 2), num_res_blocks=1,
                   attn_resolutions=(16,), resolution=32)
DAD = [*TINY, "robustify.method=dad", "robustify.augment=none", "robustify.samples=made",
       "vqgan.epochs=0.1", "vqgan.batch=20", "vqgan.n_images=200", "robustify.n_images=100"]


def drawn_vqgan(config=SMALL_VQGAN):
    """A VQGAN whose tensors are functions of their names."""
    net = erpm.vqgan(config)
    net.load_state_dict({k: torch.randn(v.shape, generator=erpm.rng(k)) * v[0].numel() ** -0.5
                         for k, v in net.state_dict().items()})
    return erpm.freeze(net)


@pytest.mark.parametrize("name, tensors, parameters, names", [
    ("vqgan_openimages_f8_16384", 299, 67_717_295, "ef9aaff6bb472ca2"),
    ("vqgan_imagenet_f16_1024", 343, 72_141_699, "a1929d2a7d6298c6")])
def test_published_vqgans_fit_by_name_and_shape(name, tensors, parameters, names):
    import hashlib
    with torch.device("meta"):
        state = erpm.vqgan(name).state_dict()
    assert (len(state), sum(v.numel() for v in state.values())) == (tensors, parameters)
    shapes = json.dumps(sorted((k, tuple(v.shape)) for k, v in state.items()))
    assert hashlib.sha256(shapes.encode()).hexdigest()[:16] == names   # of taming-transformers


def test_the_vqgan_gives_what_taming_transformers_gives():
    net, x = drawn_vqgan(), torch.rand(2, 3, 32, 32, generator=erpm.rng("x"))
    seen = net(x)
    assert net.nearest(net.encode(x)).sum() == 13475
    assert seen.mean().item() == pytest.approx(0.49644992, abs=1e-4)
    assert seen.std().item() == pytest.approx(0.36649489, abs=1e-4)
    assert seen[1, :, 7, 20].tolist() == pytest.approx([0.000165, 0.398866, 0.879935], abs=1e-4)


def test_the_nearest_code_is_that_of_a_loop():
    net, z = drawn_vqgan(), torch.randn(2, 4, 3, 3)
    slow = [[[(net.codes - z[n, :, i, j]).square().sum(1).argmin().item() for j in range(3)]
             for i in range(3)] for n in range(2)]
    assert net.nearest(z).tolist() == slow


def test_vqgan_weights_load_strictly_from_a_nest_and_without_the_loss(tmp_path):
    net, path = drawn_vqgan(), tmp_path / "vq.pt"
    torch.save({"state_dict": net.state_dict() | {"loss.disc": torch.ones(1)}}, path)
    assert equal(erpm.vqgan(SMALL_VQGAN, path), net)
    torch.save({k: v for k, v in net.state_dict().items() if "quant_conv" not in k}, path)
    with refuses("does not fit the VQGAN"):
        erpm.vqgan(SMALL_VQGAN, path)
    torch.save({"state_dict": net.state_dict(), "callbacks": slice(3)}, path)
    with refuses("['state_dict'], 'vqgan.pt')"):
        erpm.vqgan(SMALL_VQGAN, path)


def test_a_vqgan_of_a_yaml_file_is_that_of_its_words(tmp_path):
    words = dict(SMALL_VQGAN, ch_mult=[1, 2], attn_resolutions=[16], double_z=False)
    top = {k: words.pop(k) for k in ("n_embed", "embed_dim")}
    file = tmp_path / "model.yaml"
    file.write_text(json.dumps({"model": {"params": {**top, "ddconfig": words}}}))
    assert erpm.vqgan(str(file)).state_dict().keys() == drawn_vqgan().state_dict().keys()
    for config, says in (({}, "lacks n_embed"), ("no", "unknown vqgan.name"),
                         (SMALL_VQGAN | {"double_z": True}, "double_z")):
        with refuses(says):
            erpm.vqgan(config)
    with refuses("33 px are no multiple of 2"):
        erpm.vqgan(SMALL_VQGAN)(torch.zeros(1, 3, 33, 33))


def identity(x):
    return x


@pytest.mark.parametrize("more", [{}, {"steps": 3}, {"start": 0.0}, {"step": 5.0}])
def test_samples_stay_in_the_ball_and_raise_the_teachers_loss(more):
    x, y = images(6), torch.arange(6) % 5
    teacher = erpm.freeze(erpm.Net(tiny_net()))
    made = erpm.dad_samples(x, y, teacher, identity, erpm.rng(0), radius=0.5, **more)
    gap = (made - x / 255).flatten(1).norm(dim=1)
    assert made.min() >= 0 and made.max() <= 1 and (gap <= 0.5 + 1e-5).all() and (gap > 0.05).all()
    still = erpm.dad_samples(x, y, teacher, identity, erpm.rng(0), radius=0.5, steps=0, **{
        k: v for k, v in more.items() if k == "start"})
    loss = [F.cross_entropy(teacher(v), y) for v in (made, still)]
    assert loss[0] > loss[1]


def slow_sample(x, y, teacher, vqgan, g, radius, step, start):
    """The algorithm of [B], word by word, for one image."""
    x0 = vqgan(x[None] / 255)[0].detach()
    on, noise = torch.rand((), generator=g) < start, torch.randn(x.shape, generator=g)
    v = (x0 + radius * noise / noise.norm()).clamp(0, 1) if on else x0.clone()
    v.requires_grad_()
    F.cross_entropy(teacher(v[None]), y[None]).backward()
    v = v.detach() + step * v.grad / v.grad.norm()
    if (v - x0).norm() > radius:
        v = x0 + (v - x0) * radius / (v - x0).norm()
    return vqgan(v.clamp(0, 1)[None])[0]


def test_samples_equal_a_slow_loop_image_by_image():
    x, y, vqgan = images(5), torch.arange(5), drawn_vqgan()
    teacher = erpm.freeze(erpm.Net(tiny_net()))
    options = {"radius": 0.4, "step": 0.3, "start": 0.5}
    slow = torch.stack([slow_sample(x[i], y[i], teacher, vqgan, erpm.rng(i), **options)
                        for i in range(5)])
    fast = erpm.dad_samples(x, y, teacher, vqgan, [erpm.rng(i) for i in range(5)], **options)
    assert ((fast - slow).abs() < 1e-3).float().mean() > 0.99       # a code may fall the other way


def test_the_gradient_crosses_the_quantiser_where_asked():
    x, y, teacher = images(4), torch.arange(4), erpm.freeze(erpm.Net(tiny_net()))
    a, b = (erpm.dad_samples(x, y, teacher, drawn_vqgan(), erpm.rng(0), radius=3, step=3,
                             through=through) for through in (False, True))
    assert not torch.equal(a, b) and torch.isfinite(b).all()


def test_the_dad_loss_is_that_of_its_equation():
    z, zt, y = torch.randn(6, 5), torch.randn(6, 5), torch.tensor([0, 4, 2])

    def kl(a, b):
        p, q = (a / 4).softmax(0), (b / 4).softmax(0)
        return sum(p[k] * (p[k] / q[k]).log() for k in range(5))
    parts = erpm.dad_loss(z, zt, y)
    ce = sum(-z[i].log_softmax(0)[y[i]] for i in range(3)) / 3
    assert parts["ce"].item() == pytest.approx(ce.item())
    for name, at in (("kd", range(3)), ("kd_dad", range(3, 6))):
        want = 8 * sum(kl(zt[i], z[i]) for i in at) / 3
        assert parts[name].item() == pytest.approx(want.item(), rel=1e-4)
    assert set(erpm.dad_loss(z[:3], zt[:3], y)) == {"ce", "kd"}


def test_samples_of_a_step_are_functions_of_the_keys_alone(monkeypatch):
    seen, real = [], erpm.dad_samples
    monkeypatch.setattr(erpm, "dad_samples", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    x, y, teacher = images(6), torch.arange(6) % 5, erpm.freeze(erpm.Net(tiny_net()))
    step = erpm.dad_step(erpm.Robustify(augment="augmix"), teacher, drawn_vqgan(), 5)
    keys = [(0, 1, i) for i in range(6)]
    for net, order in ((tiny_net(), range(6)), (tiny_net(width=4), (5, 2, 0, 1, 3, 4))):
        order = list(order)
        batch = erpm.Batch(x[order], y[order], erpm.rng(0), [keys[i] for i in order])
        loss, parts = step(erpm.Net(net), batch)
        assert torch.isfinite(loss) and set(parts) == {"ce", "kd", "kd_dad"}
    assert torch.allclose(seen[0][order], seen[1], atol=1e-3)


def test_a_vqgan_in_training_fits_its_images_and_wakes_dead_codes():
    torch.manual_seed(0)
    net, x = erpm.vqgan("tiny_f2_256"), erpm.make_shapes(8, 32, "train")[0]
    opt, losses = torch.optim.AdamW(net.parameters(), 3e-3), []
    for k in range(30):
        loss, parts = erpm.vqgan_step(net, erpm.Batch(x, None, erpm.rng(k)))
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(parts["mse"].item())
    assert statistics.mean(losses[-5:]) < 0.5 * statistics.mean(losses[3:8])
    assert len(net.nearest(net.encode(x / 255)).unique()) > 16


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*.png")}


def test_dad_from_the_command_line_stores_resumes_and_refuses_other_samples(here, capsys):
    out = runs("robustify", "run=a", *DAD)
    assert "samples.json" in os.listdir("runs/a/made") and "vqgan.safetensors: " in out
    first = files_of("runs/a/made")
    assert len(first) == 100
    for p in list(first)[::3]:
        (here / "runs/a/made" / p).unlink()
    shutil.move("runs/a/teacher.safetensors", "kept.safetensors")
    runs("robustify", "run=a", *DAD)
    assert files_of("runs/a/made") == first
    assert equal(erpm.load("kept.safetensors"), erpm.load("runs/a/teacher.safetensors"))
    (here / "runs/a/teacher.safetensors").unlink()
    assert "holds samples of other settings (radius" in fails(
        capsys, "robustify", "run=a", *DAD, "robustify.radius=0.2")
    for word, says in (("vqgan.name=f9", "unknown vqgan.name 'f9'"),
                       ("vqgan.name=none.yaml", "none.yaml"),
                       ("vqgan.weights=none.pt", "no file none.pt")):
        assert says in fails(capsys, "robustify", "run=c", *DAD, word)
        assert not Path("runs/c").is_dir() or not os.listdir("runs/c")
    assert "unknown distill.method 'none'" in fails(capsys, "distill", *DAD, "distill.method=none")


def test_two_processes_share_the_samples_of_one(here):
    runs("pretrain", "run=a", *DAD)
    vqgan = drawn_vqgan()
    erpm.save(here / "vq.safetensors", vqgan)
    (here / "vq.yaml").write_text(json.dumps(
        {"model": {"params": {k: list(v) if isinstance(v, tuple) else v
                              for k, v in SMALL_VQGAN.items()}}}))
    words = [*DAD, "vqgan.name=vq.yaml", "vqgan.weights=vq.safetensors"]
    runs("robustify", "run=a", *words)
    (here / "runs/a/teacher.safetensors").unlink()
    in_processes(2, here, "robustify", "run=a", *words, "robustify.samples=two")
    assert files_of("runs/a/made") == files_of("runs/a/two") and len(files_of("runs/a/two")) == 100


def test_a_vision_language_teacher_a_small_and_a_large_network_are_three_rows(here, tiny_clips):
    rows = "KD: robustify.method=kd distill.method=none\nERPM:"
    out = runs("compare", *DAD, f"robustify.teacher=open_clip:tiny", "pretrain.epochs=0.2",
               "robustify.epochs=0.2", "distill.epochs=0.2", f"compare.rows={rows}",
               "eval.sets=shapes")
    assert f"open_clip:tiny " in out and "KD " in out and "ERPM + teacher" in out
    assert "KD + teacher" not in out


# ==== from another project ====

@pytest.mark.parametrize("form", ["tensors", "set", "pairs"])
def test_another_project_trains_its_own_network_in_a_few_lines(form, here):
    data = erpm.open_set("shapes", erpm.Data(n_train=400), "train")
    x, y = data.images, torch.from_numpy(data.y)
    train = {"tensors": (x, y), "set": data, "pairs": TensorDataset(x, y)}[form]
    net = tiny_net(10, 16)
    small = erpm.robustify(erpm.Net(tiny_net(10)), train, epochs=1, batch=50, augment="augmix")
    before = erpm.evaluate(erpm.Net(net), (x, y))["nll"]
    erpm.robustify(net, train, epochs=2, batch=50, lr=1e-2, augment="none", flip=False)
    assert erpm.evaluate(erpm.Net(net), (x, y))["nll"] < before
    s = erpm.Student(net, tune=1, head=1)
    out = erpm.distill(s, small, train, epochs=1, batch=50, lr=1e-2, alpha=0.5)
    assert out is s and not s.training and not os.listdir()    # nothing is written
    assert not torch.equal(s(x[:4]).clean, net(x[:4] / 255))
    assert not any(p.requires_grad for p in small.parameters())
    again = [erpm.robustify(tiny_net(10), train, epochs=0.5, batch=50, seed=3) for _ in "ab"]
    assert equal(*again)                                       # the same seed, the same weights


@pytest.mark.parametrize("settings, says", [
    ({"batch": 0}, "batch"), ({"accum": 7}, "accum"), ({"lr": math.nan}, "lr"),
    ({"batch": 500}, "fewer than a batch"), ({"augment": "augmax"}, "augmax")])
def test_a_mistake_from_another_project_is_a_clear_error(settings, says):
    for train, nets in ((erpm.robustify, (tiny_net(),)),
                        (erpm.distill, (student(), tiny_net()))):
        with refuses(says):
            train(*nets, shown(n=40), **{"batch": 20} | settings)
