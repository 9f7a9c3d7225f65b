"""Tests of erpm.py: CPU, no network, tiny synthetic data.  A test's name is the law it checks."""
import ast
import contextlib
import copy
import dataclasses
import dis
import functools
import io
import itertools
import json
import math
import operator
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import auto_augment as timm_ops
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.utils.data import DataLoader, TensorDataset

import erpm

HERE = Path(__file__).parent
SOURCE = (HERE / "erpm.py").read_text()
TREE = ast.parse(SOURCE)
# torchvision 0.29 announces that its decoder will go; Pillow takes over then
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities")
SLOW = bool(os.environ.get("ERPM_SLOW"))
to_pil = erpm.v2.functional.to_pil_image
TINY = """\
model.student=cifar:resnet8-s2 model.teacher=cifar:resnet8-s2 distill.tune=2 distill.head=1
data.n_test=20 data.n_train=40 pretrain.batch=20 pretrain.epochs=0.5 robustify.batch=20
robustify.epochs=0.5 distill.batch=20 distill.epochs=0.5 eval.batch=32 eval.passes=3 eval.n_cell=8
runtime.log_every=2 runtime.amp=none runtime.save_every=3""".split()
torch.set_num_threads(1)
gflops, figures = erpm.gflops, erpm.figures   # for their own tests; what takes long and does not
erpm.gflops = lambda *a: 1.0                  # matter is left out of the commands
erpm.figures = Mock(side_effect=ImportError)                                # as without matplotlib


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
    os.setpgid(job.pid, job.pid)                     # to be killed with its loader processes
    return job


def started(n, *words, own=lambda rank: ()):
    """The jobs of a command on n processes, as torchrun starts it, each with words of its own."""
    port = str(get_free_port())

    def work(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n),
                       "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        return erpm.main([str(w) for w in (*words, *own(rank))])
    return [forked(work, rank) for rank in range(n)]


def in_processes(n, *words, code=0, **own):
    """Runs a command on n processes, to the end."""
    jobs = started(n, *words, **own)
    for job in jobs:
        job.join(200)
    assert [job.exitcode for job in jobs] == [code] * n


def tiny_net(classes=5, width=8):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(n, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
              for n in (3, width, width)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(width, classes)).eval()


def images(n=16, size=32, seed=0):
    return torch.randint(0, 256, (n, 3, size, size),
                         generator=erpm.rng("test", seed)).to(torch.uint8)


def shown(classes=5, n=16, size=32, ids=None):
    return erpm.ImageSet("x", np.arange(n) * 7 % classes, map(str, range(classes)),
                         erpm.View(size, 1.0), images=images(n, size), ids=ids)


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
    timing = ("seconds", "processes", "sum")
    return [{k: v for k, v in r.items() if k not in timing} for r in result_rows(run)]


def equal(a, b):
    a, b = (m.state_dict() if isinstance(m, nn.Module) else m for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# ==== the file itself ====

def test_sections_are_those_of_the_docstring():
    banners = re.findall(r"^# ==== (\d+\. [A-Z]+) ====$", SOURCE, re.M)
    listed = re.findall(r"\d+\. [A-Z]+", ast.get_docstring(TREE))
    assert banners == listed and len(banners) == 12


def test_nothing_is_used_before_it_is_defined():
    below = set()
    for node in reversed(TREE.body):
        code = compile(ast.Module([node], []), "erpm.py", "exec")
        dis.dis(code, file=(listing := io.StringIO()))               # the functions within as well
        used = set(re.findall(r"LOAD_GLOBAL .*\((?:NULL \+ )?(\w+)", listing.getvalue()))
        assert not used & below, f"line {node.lineno} uses what stands below it"
        below |= {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_NAME"}


def test_functions_are_short_lines_narrow_and_public_names_documented():
    lengths = [n.end_lineno - n.lineno + 1 for n in ast.walk(TREE) if type(n) is ast.FunctionDef]
    assert max(lengths) <= 60 and np.median(lengths) <= 12
    both = SOURCE + Path(__file__).read_text()
    assert max(map(len, both.splitlines())) <= 100 and not re.search("TODO|FIXME", SOURCE)
    public = [n for n in TREE.body if hasattr(n, "name") and n.name[0] != "_"]
    assert all(ast.get_docstring(n) for n in public)


def test_import_has_no_side_effect_and_a_held_loader_keeps_no_process_from_ending(here):
    make_tree(here / "set")
    code = ("import torch, os, sys; "
            "before = torch.random.get_rng_state(), dict(os.environ), os.listdir()\n"
            f"sys.path.insert(0, {str(HERE)!r}); sys.argv = ['x', '--bad']; import erpm\n"
            "assert torch.equal(before[0], torch.random.get_rng_state())\n"
            "assert before[1:] == (dict(os.environ), os.listdir())\n"
            "assert not {'timm', 'open_clip', 'matplotlib'} & set(sys.modules)\n"
            "s = erpm.open_set('folder:set', erpm.Data(), 'train')\n"
            "it = iter(erpm.loader(s, 1, batch_sampler=erpm.batches(len(s), 4, 0)))\n"
            "next(it); 1 / 0")
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=300)
    assert done.stdout == "" and re.match("Traceback[^$]*ZeroDivisionError", done.stderr)


def test_every_recipe_loads_and_every_command_of_the_readme_parses():
    for name in erpm.read_yaml(HERE / "config.yaml"):
        assert erpm.resolve([], name).run == name
    lines = re.findall(r"^ *(?:torchrun.* |python )erpm\.py (.*?)(?:  +#.*)?$",
                       (HERE / "README.md").read_text(), re.M)
    assert len(lines) >= 14
    for line in [part for line in lines for part in re.split(r" && python erpm\.py ", line)]:
        args = erpm.parse(shlex.split(line))
        assert args.command in erpm.COMMANDS
        erpm.resolve(args.words, "" if args.config else args.recipe)


def test_the_python_of_the_readme_runs_and_writes_what_it_says_alone(here):
    [code] = re.findall(r"^```python\n(.*?)^```", (HERE / "README.md").read_text(), re.M | re.S)
    assert len(code.splitlines()) <= 20
    names = {}
    exec(code.replace("import erpm, torch", "import torch"), {"erpm": erpm} | names, names)
    assert names["p"].probs.shape == (8, 10) and set(names["row"]["rules"]) >= set(erpm.RULES)
    assert equal(names["student"], names["again"]) and os.listdir() == ["student.safetensors"]


# ==== basics and config ====

def test_precedence_is_default_recipe_words():
    cfg = erpm.resolve(["distill.lr=0.5", "seed=3"], "demo")
    assert (cfg.distill.lr, cfg.seed, cfg.run) == (0.5, 3, "demo-s3")
    names = [erpm.resolve(words, recipe).run for words, recipe in (
        (["data.name=cifar10"], "demo"), ([], ""), (["data.name=folder:a/b c"], ""),
        (["run=x", "seed=2"], "demo"))]
    assert names == ["demo-cifar10", "shapes", "folder-a-b-c", "x"]
    assert erpm.configure(erpm.parse(["eval", "--model", "a", "seed=1"])).run == "models"


def test_without_a_recipe_the_defaults_that_help_prints_are_what_runs(capsys):
    with pytest.raises(SystemExit):
        erpm.main(["distill", "--help"])
    told = capsys.readouterr().out
    defaults = dict(zip(erpm.FIELDS, operator.attrgetter(*erpm.FIELDS)(erpm.Config())))
    assert all(f"\n  {key}={value} " in told for key, value in defaults.items())
    assert erpm.configure(erpm.parse(["distill"])) == erpm.resolve()


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


@pytest.mark.parametrize("text, says", [
    ("demo: {seed: 1}\ndemo: {seed: 2}", "'demo' stands twice"),
    ("demo: {seeds: 1}", "'seeds'; did you mean 'seed'?"),
    ("demo: {distill: {lr: 1e-3, batch: 2.5}}", "distill.batch: expected int of 1 to"),
    ("demo: [1, 2]", "demo: expected a mapping of settings, got ['1', '2']"),
    ("demo: {data: }", "'data'"), ("", "expected a mapping in YAML"),
    ("demo: [", "expected a mapping in YAML"), ("demo: {? [1] : 2}", "a mapping in YAML"),
    ("demo: &a {data: *a}", "expected a mapping in YAML"), ("other: {}", "unknown recipe")])
def test_yaml_traps_are_errors_of_one_line(tmp_path, text, says):
    (tmp_path / "c.yaml").write_text(text)
    with refuses(says):
        erpm.resolve([], "demo", tmp_path / "c.yaml")


def test_yaml_values_are_read_as_words_are(tmp_path):
    (tmp_path / "c.yaml").write_text("{run: no, seed: 3, data: {crop: false, root: 12:30}}")
    words = ["run=no", "seed=3", "data.crop=false", "data.root=12:30"]
    assert erpm.resolve(file=tmp_path / "c.yaml") == erpm.resolve(words)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new/x.txt"
    erpm.write_atomically(path, "old")
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError("disk full")))
    with refuses(f"cannot write {path}: disk full"):
        erpm.write_atomically(path, "half of it")
    assert [p.read_text() for p in path.parent.iterdir()] == ["old"]


@pytest.mark.parametrize("place", ["run=x", "out=runs/x", "out=/proc/none", f"run={'x' * 300}"])
@pytest.mark.parametrize("words", [["pretrain", *TINY], ["eval", "--set", "shapes"], ["bench"]])
def test_a_run_that_cannot_be_written_or_read_is_one_line_and_code_2(place, words, here, capsys):
    (here / "runs").mkdir()
    (here / "runs/x").write_text("a file")
    assert len(fails(capsys, *words, place)) < 1000


# ==== data ====

def batch(s, positions=None, epoch=0):
    """(x, y, index) of some or all samples of a set."""
    return s.__getitems__([(epoch, k) for k in (range(len(s)) if positions is None else positions)])


@pytest.mark.parametrize("style, size", [("", 32), ("r", 64)])
def test_shapes_are_functions_of_the_index_and_vary(style, size):
    x, y = erpm.make_shapes(200, size, "test", style)
    some, other = (erpm.make_shapes(50, size, split, style)[0] for split in ("test", "train"))
    assert torch.equal(x[:50], some) and not torch.equal(x[:50], other)
    assert x.float().std(0).mean() > 5 and np.bincount(y).tolist() == [20] * 10


@pytest.mark.parametrize("name", ["shapes", "folder:."])
def test_samples_are_functions_of_seed_epoch_and_index_not_of_workers(here, name):
    make_tree(here)
    s = erpm.open_set(name, erpm.Data(n_train=11, size_px=32), "train").training(seed=1)
    some, keys = batch(s, range(5), epoch=2)[0], [[(2, k)] for k in range(5)]
    for other, epoch in ((s.training(seed=2), 2), (s, 3)):
        assert not torch.equal(some, batch(other, range(5), epoch)[0])
    for workers in (0, 2):
        loaded = erpm.loader(s, workers, batch_sampler=keys)
        assert torch.equal(some, torch.cat([x for x, _, _ in loaded]))


@pytest.mark.parametrize("crop, flip", [(True, True), (True, False), (False, True), (False, False)])
def test_shifts_and_flips_are_the_slow_obvious_ones(crop, flip):
    s, u = shown(), np.random.default_rng(erpm.fold(0, "crop", 1)).random((16, 3), np.float32)
    got = batch(s.training(0, crop, flip), epoch=1)[0]
    for i, (a, b, mirror) in enumerate(u):
        padded = F.pad(s.images[i:i + 1].float(), (4,) * 4, mode="reflect")
        r, c = (int(a * 9), int(b * 9)) if crop else (4, 4)
        want = padded[0, :, r:r + 32, c:c + 32].to(torch.uint8)
        assert torch.equal(got[i], want.flip(-1) if flip and mirror >= 0.5 else want)


@pytest.mark.parametrize("fit", ["", "crop", "squash"])
@pytest.mark.parametrize("squash", [False, True])
def test_fit_crop_cuts_the_centre_out_and_squash_cuts_nothing_off(here, fit, squash):
    make_tree(here, n=1, splits=("",), size=(40, 80))
    s = erpm.open_set("folder:.", erpm.Data(size_px=32, fit=fit),
                      view=erpm.View(64, 0.8, "bicubic", squash))
    want = Image.open("cat/0.png").resize((80, 40), Image.BICUBIC).crop((24, 4, 56, 36))
    if fit == "squash" or squash and not fit:
        want = Image.open("cat/0.png").resize((32, 32), Image.BICUBIC)
    assert np.array_equal(batch(s)[0][0].permute(1, 2, 0), np.asarray(want))


def test_orders_are_permutations_that_a_restart_repeats(monkeypatch):
    def take(start, k):
        return list(itertools.islice(erpm.batches(105, 10, seed=5), start, start + k))
    whole, shares = take(0, 25), []
    assert len({i for b in whole[:10] for _, i in b}) == 100
    assert take(13, 12) == whole[13:] and [e for e, _ in whole[20]] == [2] * 10
    for rank in range(3):                            # every process takes its part of each batch
        monkeypatch.setattr(erpm, "world", lambda: (rank, 3))
        shares.append(take(0, 25))
    assert [sum(parts, []) for parts in zip(*shares)] == whole


def test_folder_sets_read_train_and_val_and_take_a_label(here):
    make_tree(here)
    make_tree(here / "flat", ("owl", "ant", ".git"), n=2, splits=("",))
    put_files(here / "flat", {"owl/._0.png": b"no picture", "notes.txt": "x"})
    for split in ("train", "test"):
        s = erpm.open_set("folder:.", erpm.Data(size_px=32), split)
        assert (len(s), s.classes, s.name) == (12, ("cat", "dog"), "folder:.")
        assert batch(s, [0, 11])[1].tolist() == [0, 1]
    (here / "val/owl").mkdir()
    with refuses("pictures alone: owl"):
        erpm.open_set("folder:.", split="train")
    s = erpm.open_set("birds@folder-c:flat")
    assert (s.classes, s.y.tolist()) == (("ant", "owl"), [0, 0, 1, 1])
    assert s.corrupted and s.name == "birds-c" and len(erpm.CELLS) == 75


# ==== sets ====

def encoded(k, size=(20, 14), frame=0):
    """The file of a picture whose colour tells the number k, with a red frame of `frame` px."""
    colour, file = tuple(25 * (k // d % 10) + 12 for d in (100, 10, 1)), io.BytesIO()
    ImageOps.expand(Image.new("RGB", size, colour), frame, (255, 0, 0)).save(file, "PNG")
    return file.getvalue()


def decoded(x):
    """The numbers that the colours of images tell, all over."""
    k = (x.long() // 25 * torch.tensor([100, 10, 1])[:, None, None]).sum(1).flatten(1)
    assert torch.equal(k.amin(1), k.amax(1))
    return k[:, 0].tolist()


def put_files(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """Every set of the ImageNet family in miniature: solid pictures that tell the class."""
    root, names = tmp_path_factory.mktemp("mini"), erpm.synsets()
    some = {names[k]: encoded(k) for k in range(0, 1000, 9)}
    put_files(root, {f"imagenet/val/{c}/0.JPEG": data for c, data in some.items()}
              | {f"sketch/{c}/0.JPG": data for c, data in some.items()}
              | {f"imagenetv2-matched-frequency-format-val/{names.index(c)}/a.jpeg": data
                 for c, data in some.items()}
              | {f"imagenet-{part}/{c}/0.jpg": encoded(names.index(c))
                 for part in "ar" for c in erpm.synsets(part)[::5]}
              | {f"objectnet-1.0/images/{c}/{i}.png": encoded(i, (30, 40), frame=2)
                 for c, ids in erpm.OBJECTNET.items() for i in ids}
              | {f"imagenet-c/{cell}/{names[k]}/0.JPEG": encoded(k)
                 for cell in ("gaussian_noise/1", "weather/fog/3") for k in (3, 10, 500, 999)}
              | {name: b"no picture" for name in (
                  "objectnet-1.0/images/air_freshener/0.png", "imagenet/val/__MACOSX/._x.JPEG",
                  "imagenet-a/README.txt", f"imagenet-r/{erpm.synsets('r')[0]}/._0.jpg")})
    return root


def partial_data(root, **more):
    return erpm.Data(root=str(root), allow_partial=True, **{"size_px": 32} | more)


@pytest.mark.parametrize("name, n", {
    "imagenet": 112, "imagenet-v2": 112, "imagenet-sketch": 112, "imagenet-a": 40, "imagenet-r": 40,
    "objectnet": 125, "imagenet@a": 22, "imagenet@r": 23, "imagenet@objectnet": 20}.items())
def test_every_set_of_the_miniature_imagenet_has_the_right_labels(mini, name, n):
    s, row, names = erpm.open_set(name, partial_data(mini)), erpm.SETS[name], erpm.synsets()
    ids = s.ids.tolist() if s.ids is not None else [[k] for k in range(1000)]
    x, y, index = batch(s)
    assert len(s) == n and all(k in ids[label] for k, label in zip(decoded(x), y))
    assert len(s.classes) == row.n_classes == len(ids) and s.outputs == names
    assert s.name == f"{name} ({n} of {row.n_test:,} images)"
    assert s.classes == tuple(erpm.OBJECTNET if name.endswith("objectnet")
                              else (names[k] for k, *_ in ids))
    assert "@" not in name or row.n_test == 50 * len({i for many in ids for i in many})


def test_imagenet_c_is_read_from_disk_cell_by_cell(mini):
    data, view = partial_data(mini, size_px=0), erpm.View(288, 0.9, "bicubic")
    s = erpm.open_set("imagenet-c", data, view=view)
    assert (s.view, s.corrupted) == (erpm.View(224, 1.0), "read")
    assert s.name == "imagenet-c (4 of 50,000 images)"
    some = erpm.open_set("imagenet-c", data, view=view, cell=("fog", 3))      # as the tars have it
    assert some.y.tolist() == decoded(batch(some)[0]) == [3, 10, 500, 999]
    assert all("/fog/3/" in p for p in some.images)
    with refuses("lacks the cell fog/2"):
        erpm.open_set("imagenet-c", data, cell=("fog", 2))


def test_without_an_archive_cells_are_made_from_the_benchmarks_own_view(mini, tmp_path):
    (tmp_path / "imagenet").symlink_to(mini / "imagenet")
    view = erpm.View(336, 1.0, "bicubic", squash=True)
    s = erpm.open_set("imagenet-c", partial_data(tmp_path, fit="squash"), view=view)
    assert s.view == erpm.View(224, 0.875, "bilinear") and s.corrupted == "made"
    assert s.name == "imagenet-c (regenerated, 112 of 50,000 images)"
    s = erpm.open_set("objectnet-c", partial_data(mini), view=view)
    assert s.view == erpm.View(border_px=2) and s.corrupted


def small_row(monkeypatch, name, **changes):
    monkeypatch.setitem(erpm.SETS, name, dataclasses.replace(erpm.SETS[name], **changes))


def test_a_half_unpacked_set_is_refused_with_both_counts(mini, monkeypatch):
    data = erpm.Data(root=str(mini), size_px=32)
    small_row(monkeypatch, "imagenet-v2", n_test=112)
    assert erpm.open_set("imagenet-v2", data).name == "imagenet-v2"
    small_row(monkeypatch, "imagenet-v2", n_test=111)        # more than published are no set either
    for name, n in (("imagenet", "50,000"), ("imagenet@a", "10,000"), ("imagenet-c", "50,000"),
                    ("imagenet-v2", "111")):
        with pytest.raises(erpm.UserError, match=f" images of .* in {mini}/.*, expected {n}"):
            erpm.open_set(name, data)


def test_tiny_imagenet_is_read_as_published(here, monkeypatch):
    small_row(monkeypatch, "tiny-imagenet", n_train=4, n_test=3, n_classes=2)
    top, b, a = here / "data/tiny-imagenet-200", "n02124075", "n01443537"     # not in text order
    put_files(top, {"test/images/test_0.JPEG": encoded(0)}
              | {f"train/{w}/images/{w}_{i}.JPEG": encoded(1) for w in (b, a) for i in (0, 1)}
              | {f"val/images/val_{i}.JPEG": encoded(i, size=(64, 64)) for i in range(3)}
              | {"val/val_annotations.txt": "".join(f"val_{i}.JPEG\t{w}\t0\t32\t44\t62\n"
                                                    for i, w in enumerate((b, a, b)))})
    s = erpm.open_set("tiny-imagenet", view=erpm.View(224))
    assert s.classes == (a, b) and s.view == erpm.View(64, 1.0)
    assert s.y.tolist() == [1, 0, 1] and decoded(batch(s)[0]) == [0, 1, 2]
    assert erpm.open_set("tiny-imagenet", split="train").y.tolist() == [0, 0, 1, 1]
    put_files(here / "data/Tiny-ImageNet-C/snow/4", {f"{w}/x.JPEG": encoded(9) for w in (b, a)})
    s = erpm.open_set("tiny-imagenet-c", partial_data("data"), cell=("snow", 4))
    assert s.y.tolist() == [0, 1] and a in s.images[0] and s.view.size_px == 64


def test_cifar_c_is_read_from_its_arrays_and_its_rows_are_those_of_its_cells(here, monkeypatch):
    small_row(monkeypatch, "cifar10", n_test=4)
    folder, rng = here / "data/CIFAR-10-C", np.random.default_rng(0)
    arrays = {c: rng.integers(0, 256, (20, 32, 32, 3), np.uint8) for c in erpm.CORRUPTIONS}
    folder.mkdir(parents=True)
    for name, x in {"labels": np.tile(np.uint8([3, 8, 8, 0]), 5), **arrays}.items():
        np.save(folder / f"{name}.npy", x)
    net = saved(here / "x/model.safetensors", erpm.build("cifar:resnet8-s2", 10), "cifar10",
                classes=tuple("abcdefghij"))
    runs("eval", "--model", "run:x", "--set", "cifar10-c", "runtime.amp=none")
    rows = {(r["corruption"], r["severity"]): r["nll"] for r in result_rows("runs/models")}
    assert list(rows) == erpm.CELLS
    for name, k in (("fog", 1), ("jpeg_compression", 5)):
        s = erpm.open_set("cifar10-c", cell=(name, k))
        assert s.y.tolist() == [3, 8, 8, 0] and rows[name, k] == erpm.evaluate(net, s)["nll"]
        assert np.array_equal(batch(s)[0].permute(0, 2, 3, 1), arrays[name][4 * k - 4:4 * k])


@pytest.mark.parametrize("name, cls, n_train, border", [
    ("flowers102", "Flowers102", 5, None), ("cifar10", "CIFAR10", 3, 9),
    ("fashion-mnist", "FashionMNIST", 3, 0)])
def test_torchvisions_sets_are_read_by_its_classes(here, monkeypatch, name, cls, n_train, border):
    def fake(root, split="", train=True):
        n = {"train": 3, "val": 2, "test": 4}[split or ("train" if train else "test")]
        x = np.full((n, 32, 32, 3), 9, np.uint8)
        return Mock(_image_files=["x"] * n, _labels=[7] * n, targets=[7] * n, classes=fake.classes,
                    data=x if name == "cifar10" else x[:, :28, :28, 0])

    fake.classes = "abcdefghij"
    (here / "data" / erpm.SETS[name].test).mkdir(parents=True)
    monkeypatch.setattr(erpm.torchvision.datasets, cls, fake)
    small_row(monkeypatch, name, n_classes=10, n_train=n_train, n_test=4)
    test, train = (erpm.open_set(name, split=s) for s in ("test", "train"))
    assert (len(test), len(train), test.y[0]) == (4, n_train, 7)
    if border is not None:                                        # 28 px are padded to 32
        assert batch(test)[0][:, 0, 0, 16].tolist() == [border] * 4
        assert batch(test)[0].shape == (4, 3, 32, 32) and test.images[0, 0, 16, 16] == 9


@pytest.mark.parametrize("name, top, lists, line", [
    ("sun397", "SUN397/", ("SUN397/Training_01.txt", "SUN397/Testing_01.txt"), "/{}\r\n"),
    ("places205", "places205/data/vision/torralba/deeplearning/images256/",
     [f"places205/trainvalsplit_places205/{s}_places205.csv" for s in ("train", "val")], "{} 0\n")])
def test_sun397_and_places205_go_by_their_lists(here, monkeypatch, name, top, lists, line):
    small_row(monkeypatch, name, n_train=2, n_test=3, n_classes=2)
    paths = ["a/abbey/0.jpg", "a/apse/indoor/1.jpg", "a/abbey/2.jpg"]
    put_files(here / "data", {top + p: encoded(k) for k, p in enumerate(paths)} | {
        lists[k]: "".join(map(line.format, paths[1 - k:])) for k in (0, 1)})
    for split, first in (("train", 1), ("test", 0)):
        s = erpm.open_set(name, split=split)
        assert s.classes == ("abbey", "apse/indoor") and s.y.tolist() == [0, 1, 0][first:]
        assert decoded(batch(s)[0]) == [0, 1, 2][first:]
    small_row(monkeypatch, name, n_classes=3)
    with refuses(f"{name}: 3 images of 2 classes in "):
        erpm.open_set(name)


def test_sets_lists_every_set_and_its_faults(here):
    put_files(here / "data", {"imagenet-a/n01498041/x.jpg": encoded(1), "2021_valid/a/x.jpg": b"",
                              "cifar-10-batches-py/x": b""})
    make_tree(here / "mine", n=2, splits=("",))
    out = runs("sets", "--set", "pets@folder:mine")
    assert all(f"| {name} " in out for name in (*erpm.SETS, "imagenet-c"))
    rows = {c[0]: c[1:5] for c in ([w.strip() for w in line.strip("|").split("|")]
                                   for line in out.splitlines()) if len(c) > 4}
    assert rows["pets@folder:mine"] == ["4", "any", "any", "mine"]
    assert rows["imagenet-a"][:2] == ["1", "7500"] and rows["cifar10"][0] == "spoilt"
    assert "inaturalist2021: 1 images of 1 classes in" in out and not (here / "runs").exists()


# ==== corruptions ====

# What the reference (make_imagenet_c.py with ImageMagick, OpenCV, scikit-image) makes of picture():
# for severities 1 to 5 the PSNR to the clean picture in dB, the mean step between horizontal
# neighbours and the mean.
REFERENCE = dict(line.split(maxsplit=1) for line in """\
gaussian_noise    22.59/21.32/153 19.21/30.55/152 15.97/43.43/151 13.19/58.72/149 10.67/77.09/146
shot_noise        21.14/24.02/152 17.51/35.49/149 14.61/48.62/146 11.33/69.14/139 9.48/83.11/133
impulse_noise     19.66/12.12/155 16.78/18.91/154 14.98/25.87/153 12.22/42.81/151 10.19/62.38/148
defocus_blur      28.02/3.96/155 26.30/3.68/155 23.49/3.14/155 21.47/2.65/156 19.71/2.21/156
glass_blur        25.11/4.37/154 25.44/4.13/154 20.23/4.13/153 21.25/3.88/154 20.24/3.14/154
motion_blur       23.45/4.08/156 20.47/3.65/157 18.14/3.19/158 16.59/2.70/160 15.79/2.37/161
zoom_blur         18.13/3.19/156 17.04/2.86/156 16.77/2.59/156 16.25/2.42/156 16.01/2.25/156
snow              16.62/7.16/186 12.52/10.37/204 12.50/7.88/204 10.93/7.75/213 9.81/7.96/223
frost             13.82/5.23/200 12.20/6.07/208 11.68/6.74/208 11.89/7.26/206 11.82/7.94/203
fog               13.18/2.07/137 12.30/1.80/137 11.47/1.69/134 11.47/1.87/134 11.09/2.23/134
brightness        22.91/4.47/171 17.16/4.16/185 14.01/3.77/197 12.00/3.20/207 10.65/2.65/214
contrast          14.90/1.89/155 13.56/1.42/155 12.42/0.95/155 11.39/0.47/155 10.92/0.24/155
elastic_transform 11.82/4.55/155 10.27/5.23/158 18.19/4.64/155 17.78/4.82/155 17.40/5.37/155
pixelate          31.87/4.51/156 29.79/4.43/156 26.30/4.24/156 25.02/4.10/156 24.82/3.96/156
jpeg_compression  33.40/5.15/155 32.03/5.27/155 31.07/5.37/155 29.14/5.59/155 27.31/5.67/155
""".splitlines())
FIXED = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")


def picture(side=224):
    """uint8 (3,side,side): gradients, rings, stripes and blocks; the same on every machine."""
    v, u = np.mgrid[0:side, 0:side] / side
    r = np.hypot(u - 0.4, v - 0.6)
    g = 0.5 + 0.3 * np.sin(60 * r * r + 2 * u) + 0.2 * (r < 0.2) - 0.2 * (np.abs(u - v) < 0.05)
    g = g + 0.15 * ((16 * u).astype(int) + (16 * v).astype(int)) % 2 * (u > 0.6)
    rgb = np.stack([g * (0.6 + 0.4 * u), g * (0.9 - 0.3 * v), 0.8 * g + 0.15 * v])
    return torch.from_numpy((np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8))


def pictures(n, h=32, w=32, key=0):
    """uint8 (n,3,h,w): smooth, noisy, flat and clipped pictures in turn."""
    coarse = torch.rand(n, 3, h // 4 + 1, w // 4 + 1, generator=erpm.rng("pictures", key))
    x = F.interpolate(coarse, (h, w), mode="bicubic")
    x[1::4] = torch.rand(x[1::4].shape, generator=erpm.rng("noise", key))
    x[2::4], x[3::4] = x[2::4] * 0.1 + 0.6, (x[3::4] - 0.5) * 3
    x[0, 0] = 0.3
    return (x.clamp(0, 1) * 255).to(torch.uint8)


@pytest.mark.parametrize("name", erpm.CORRUPTIONS)
def test_every_severity_has_the_statistics_of_the_reference(name):
    n = 1 if name in FIXED else {"frost": 64, "elastic_transform": 32, "fog": 16}.get(name, 12)
    x = picture().expand(n, -1, -1, -1)
    near, bias = (0.1, 0.6) if n == 1 else (0.6, 1) if n == 12 else (0.6, 10)
    for severity, figures in enumerate(REFERENCE[name].split(), 1):
        psnr, step, mean = map(float, figures.split("/"))
        y = erpm.corrupt(x, name, severity).float()
        ours = 10 * torch.log10(255 ** 2 / (y - x).square().mean((1, 2, 3))).mean().item()
        assert abs(ours - psnr) < near and abs(y.mean() - mean) < bias, (severity, ours)
        assert abs(y.diff(dim=3).abs().mean() / step - 1) < (0.02 if n == 1 else 0.1), severity


@pytest.mark.parametrize("name", erpm.CORRUPTIONS)
def test_an_image_is_a_function_of_seed_and_index_not_of_batch_or_layout(name):
    for n, h, w in ((9, 32, 32), (9, 64, 80), (5, 224, 200)):
        x, some = pictures(n, h, w), [4, 1, 3]
        whole = erpm.corrupt(x, name, 3)
        assert torch.equal(whole[some], erpm.corrupt(x[some], name, 3, index=some))
        lying = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(whole, erpm.corrupt(lying, name, 3))
    x = pictures(1, 64, 64).expand(3, -1, -1, -1)
    a, b = erpm.corrupt(x, name, 3), erpm.corrupt(x, name, np.int64(3), seed=np.int64(1))
    assert torch.equal(a[0], a[1]) == torch.equal(a, b) == (name in FIXED)
    assert torch.equal(b, erpm.corrupt(x, name, 3, seed=1))
    for n, h, w in ((1, 32, 512), (1, 301, 40), (0, 33, 65)):        # every size works
        assert erpm.corrupt(pictures(4, h, w)[:n], name, 2).shape == (n, 3, h, w)


def test_small_pictures_have_constants_of_their_own_by_the_longer_side():
    for size, c in (((64, 40), 0.75), ((40, 65), 0.4)):
        x = pictures(1, *size)
        assert torch.equal(erpm.corrupt(x, "contrast", 1), erpm.contrast(x, c, None))


def test_the_published_round_trip_by_jpeg_equals_pillow():
    x = pictures(1, 200, 301)
    to_pil(erpm.corrupt(x, "contrast", 1)[0]).save(file := io.BytesIO(), "JPEG", quality=85)
    published = erpm.corrupt(x, "contrast", 1, jpeg=True)[0]
    assert np.array_equal(Image.open(file), to_pil(published))


@pytest.mark.parametrize("d, passes", ((1, 2), (2, 3), (4, 2)))
def test_glass_blur_is_the_loop_that_copies(d, passes):
    x, h, w = pictures(1, 36, 41), 36, 41
    # a sigma that blurs nothing
    ours = erpm.glass_blur(x, (0.05, d, passes), [erpm.rng("glass")])[0]
    g, y = erpm.rng("glass"), x[0].permute(1, 2, 0).numpy().copy()
    for _ in range(passes):
        pick = erpm.draw([g], (h, w), "random_", 0, 4 * d * d)
        for i in range(h - d, d, -1):
            for j in range(w - d, d, -1):
                dy, dx = divmod(int(pick[0, i, j]), 2 * d)
                y[i, j] = y[i + dy - d, j + dx - d]
    assert np.array_equal(y, to_pil(ours))


def test_elastic_transform_without_movement_is_the_identity():
    x = pictures(2, 64, 50)
    same = erpm.elastic_transform(x, (0, 0, 0), [erpm.rng(0), erpm.rng(1)])
    assert (same.int() - x.int()).abs().max() <= 1


def test_frost_reads_the_five_textures_of_the_package(tmp_path, monkeypatch):
    for i in range(5):
        Image.new("RGB", (300, 300), (10 * i, 0, 0)).save(tmp_path / f"frost{i + 1}.png")
    monkeypatch.setattr(erpm, "frost_folder", lambda: tmp_path)
    y = erpm.corrupt(torch.zeros(40, 3, 221, 223, dtype=torch.uint8), "frost", 1)
    assert len(y[:, 0].flatten(1).float().mean(1).round().unique()) == 5


# ---- on a GPU: its code on a CPU, and on a device without data, so with no value to wait for ----

@pytest.mark.parametrize("name", [c for c in erpm.CORRUPTIONS if c not in FIXED])
def test_a_gpu_has_the_same_statistics_and_an_image_none_of_its_batch(name, monkeypatch):
    x = picture(64).expand(32, -1, -1, -1)
    cpu = (erpm.corrupt(x, name, 3).float() - x).flatten(1)
    monkeypatch.setattr(erpm, "on_cpu", lambda x: False)
    y = erpm.corrupt(x, name, 3)
    assert torch.equal(y[[7, 4]], erpm.corrupt(x[:2], name, 3, index=[7, 4]))
    gpu = (y.float() - x).flatten(1)
    for of in (torch.mean, torch.std):
        a, b = of(cpu, 1), of(gpu, 1)
        assert abs(a.mean() - b.mean()) < 4 * ((a.var() + b.var()) / len(x)).sqrt() + 0.05


def test_noise_of_a_gpu_is_splitmix64(monkeypatch):
    monkeypatch.setattr(erpm, "on_cpu", lambda x: False)
    u = erpm.draw([erpm.rng(0), erpm.rng(1)], (3, 2), "uniform_", near=torch.empty(0))
    z = torch.randint(2 ** 62, (), generator=erpm.rng(1)).item() + 5 * 0x9E3779B97F4A7C15
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z % 2 ** 64 >> shift)) * factor % 2 ** 64
    assert abs(u[1, 2, 1].item() - z / 2 ** 64) < 1e-6


class Watched(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what runs on the device without data; a copy to it that is waited for is an error."""
    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out))
                   if isinstance(t, torch.Tensor) and t.ndim]
        if len({t.device for t in tensors}) > 1:
            assert (kwargs or {}).get("non_blocking"), f"{function} waits for the device"
        self.n += any(t.is_meta for t in tensors) and not function.is_view
        return out


@pytest.mark.parametrize("name", ["augmix", "pixmix", "deepaugment", "defocus_blur", *(
    c for c in erpm.CORRUPTIONS if c not in FIXED)])                 # the last two are Pillow's
def test_a_gpu_runs_as_many_kernels_for_many_images_as_for_few(name, monkeypatch):
    ice = erpm.ice(0, 64, 64, "cpu").to("meta")
    monkeypatch.setattr(erpm, "ice", lambda *a: ice)                 # loaded once
    counts = []
    for n in (48, 192) if name in erpm.AUGMENTATIONS else (3, 12):
        x = torch.empty(n, 3, 32, 32, dtype=torch.uint8, device="meta")
        with Watched() as watched:
            y = erpm.corrupt(x, name, 3) if name in erpm.CORRUPTIONS else \
                erpm.augment(x, name, erpm.rng(0))
        counts.append(watched.n)
    assert y.is_meta and y.shape == x.shape
    assert 0 < counts[1] < 1.3 * counts[0], counts


def test_no_step_of_training_waits_for_the_device(monkeypatch):
    """A value that the host would have to read does not exist there."""
    monkeypatch.setattr(erpm, "pick_device", lambda: torch.device("meta"))
    monkeypatch.setattr(erpm, "log_row", lambda *a: "")              # that one may wait
    net, teacher = (erpm.freeze(erpm.Net(tiny_net())).to("meta") for _ in range(2))
    aug, codes = erpm.Robustify(augment="pixmix+augmix"), drawn_vqgan().to("meta")
    s, whole = erpm.Student(net, 1, 1).to("meta"), copy.deepcopy(net).requires_grad_(True)
    both = erpm.frozen_views(s.backbone, aug, True, s.original, teacher)
    consistent, mixed = (dataclasses.replace(aug, augment=way, jsd=jsd) for way, jsd in (
        ("none", 12.0), ("deepaugment+cutmix", 0.0)))
    for module, step in ((s.tuned, erpm.erpm_step(erpm.Distill(), both)),
                         (whole, erpm.robust_step(consistent, 5)),
                         (whole, erpm.dad_step(mixed, teacher, codes, 5)),
                         (codes.requires_grad_(True), erpm.vqgan_step)):
        with Watched() as watched:
            quick_fit(step, module, epochs=0.25, ema=0.9)
        assert watched.n > 100


# ==== augmentations ====

PIL_OPS = {  # Pillow's and timm's with the arguments of the paper, level signed
    "autocontrast": lambda i, v: ImageOps.autocontrast(i),
    "equalize": lambda i, v: ImageOps.equalize(i),
    "posterize": lambda i, v: ImageOps.posterize(i, 4 - int(v * 4 / 10)),
    "solarize": lambda i, v: ImageOps.solarize(i, 256 - int(v * 256 / 10)),
    "rotate": lambda i, v: i.rotate(int(v * 30 / 10), Image.Resampling.BILINEAR),
    "shear_x": lambda i, v: timm_ops.shear_x(i, v * 0.3 / 10, resample=Image.BILINEAR),
    "shear_y": lambda i, v: timm_ops.shear_y(i, v * 0.3 / 10, resample=Image.BILINEAR),
    "translate_x": lambda i, v: timm_ops.translate_x_abs(i, int(v * (i.width / 3) / 10)),
    "translate_y": lambda i, v: timm_ops.translate_y_abs(i, int(v * (i.height / 3) / 10)),
}


@pytest.mark.parametrize("h, w", [(48, 80), (224, 224), (7, 5)])
@pytest.mark.parametrize("name", erpm.OPS)
def test_each_operation_is_within_a_grey_level_of_pil(name, h, w):
    x, random = pictures(8, h, w), np.random.default_rng(0)
    level = random.uniform(0.1, 9.9, (8, 1, 1, 1))
    if name in list(erpm.OPS)[:5]:
        level *= random.choice([-1, 1], (8, 1, 1, 1))
    op, theirs = erpm.OPS[name], [PIL_OPS[name](to_pil(i), v.item()) for i, v in zip(x, level)]
    gap = np.abs(op(x, level).permute(0, 2, 3, 1).numpy().astype(int) - np.stack(theirs))
    if name in ("rotate", "shear_x", "shear_y"):  # but for the border, where we fade out
        cover = op(torch.full_like(x, 255), level).permute(0, 2, 3, 1).numpy()
        gap = gap[(cover == 0) | (cover == 255)]
        assert (gap > 1).mean() <= 0.005 and gap.size > (0.98 if h == 224 else 0.5) * x.numel()
    else:
        assert gap.max() <= 1


@pytest.mark.parametrize("spec", [*erpm.AUGMENTATIONS, "pixmix+augmix", "deepaugment+augmix",
                                  "augmix+mixup"])
def test_output_is_a_function_of_the_generator_anew_for_each_image(spec):
    state = torch.get_rng_state()
    for n, h, w in ((16, 32, 32), (1, 32, 32), (0, 32, 32), (3, 17, 29)):
        x = pictures(1, h, w).repeat(n, 1, 1, 1)
        before = x.clone()
        a, b, c = (erpm.augment(x, spec, erpm.rng("same", k)) for k in (0, 0, 1))
        assert a.dtype == torch.uint8 and a.shape == x.shape and torch.equal(a, b)
        assert torch.equal(x, before), "the input was changed"
        if n == 16 and spec != "none":
            assert not torch.equal(a, c) and len(a.flatten(1).unique(dim=0)) > 3
    assert torch.equal(torch.get_rng_state(), state), "the global generator moved"


# mean |augmix(x) - x| of google-research/augmix on pictures(4), 8,000 draws, and its error
@pytest.mark.parametrize("severity, mean, error", [(1, 8.928, 0.115), (3, 15.786, 0.159)])
def test_augmix_deviates_as_much_as_the_original(severity, mean, error):
    x = pictures(4).repeat(500, 1, 1, 1)
    mixed = erpm.augmix(x, erpm.rng("deviation"), severity=severity)
    gap = (mixed.float() - x).abs().mean((1, 2, 3))
    assert abs(gap.mean() - mean) < 4 * (error**2 + gap.var() / len(gap)) ** 0.5


def test_jsd_equals_the_formula():
    z = [torch.randn(6, 5, generator=erpm.rng("logits", i)) * 3 for i in range(3)]
    p = [v.double().softmax(1) for v in z]
    expected = sum((q * (q * 3 / sum(p)).log()).sum(1).mean() for q in p) / 3
    assert abs(erpm.jsd(*z) - expected) < 1e-6
    assert erpm.jsd(*(v.bfloat16() for v in z)).dtype == torch.float32


def test_a_sum_is_a_sequence_in_a_fixed_order_and_options_reach_their_part():
    x, g = pictures(6), erpm.rng("sum")
    expected = erpm.augmix(erpm.pixmix(x, g), g, severity=3)
    for spec in ("pixmix+augmix", "augmix+pixmix"):
        ours = erpm.augment(x, spec, erpm.rng("sum"), augmix={"severity": 3})
        assert torch.equal(ours, expected)


def test_a_folder_of_pictures_serves_pixmix(tmp_path):
    Image.new("RGB", (60, 50), (255, 0, 0)).save(tmp_path / "red.png")
    x = torch.full((64, 3, 32, 32), 100, dtype=torch.uint8)
    red, green, blue = erpm.pixmix(x, erpm.rng(0), pictures=str(tmp_path)).unbind(1)
    assert torch.equal(green, blue) and 0.3 < (red != green).flatten(1).any(1).float().mean() < 0.8


def test_pixmix_blends_equal_the_formulas():
    x, y = torch.rand(2, 2, 3, 4, 4, generator=erpm.rng(0))
    a, b, how = np.array([0.8, 0.5]), np.array([-0.3, 0.6]), np.array([False, True])
    added = ((0.8 * (2 * x[0] - 1) - 0.3 * (2 * y[0] - 1) + 1) / 2).clamp(0, 1)
    times = ((2 * x[1]) ** 0.5 * (2 * y[1]) ** 0.6 / 2).clamp(0, 1)
    assert torch.allclose(erpm._blend(x, y, a, b, how), torch.stack([added, times]), atol=1e-6)
    assert torch.isfinite(erpm._blend(x * 0, y * 0, a, -b, ~how)).all()


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


# ==== models ====

TINY_VIT = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TINY_CLIPS = {name: {"embed_dim": 16, "text_cfg": TEXT, **more} for name, more in {
    "tiny": {"vision_cfg": TINY_VIT, "quick_gelu": True},
    "tiny-avg": {"vision_cfg": {**TINY_VIT, "pool_type": "avg", "final_ln_after_pool": True,
                                "no_ln_pre": True, "ls_init_value": 0.1}},
    "tiny-pool": {"vision_cfg": {**TINY_VIT, "attentional_pool": True, "attn_pooler_heads": 2,
                                 "output_tokens": True}, "custom_text": True},
    "tiny-rn": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8,
                               "patch_size": None}},
    "tiny-timm": {"vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "map",
                                 "timm_proj": "none", "image_size": 160}, "embed_dim": 64,
                  "custom_text": True, "init_logit_bias": -10},
    "tiny-timm-linear": {"vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "",
                                        "timm_proj": "linear", "image_size": 64}},
}.items()}
open_clip.factory._MODEL_CONFIGS |= TINY_CLIPS


SMALL = {                                                          # of timm, made smaller
    "deit3_small_patch16_224": dict(depth=2, embed_dim=48),               # token outside pos_embed
    "eva02_tiny_patch14_224": dict(depth=2), "vit_small_patch16_rope_mixed_224": dict(depth=2),
    "vit_small_patch16_dinov3": dict(depth=2, embed_dim=48, num_heads=2),
    "swin_tiny_patch4_window7_224": dict(embed_dim=8, depths=(1, 2, 1), num_heads=(1, 1, 2)),
    "swinv2_tiny_window8_256": dict(embed_dim=8, depths=(1, 2, 1), num_heads=(1, 1, 2),
                                    img_size=224, window_size=7)}
NETWORKS = [*SMALL, *(f"open_clip:{n}" for n in TINY_CLIPS), *"""
timm:test_vit timm:test_resnet timm:test_convnext timm:test_efficientnet timm:regnety_002
timm:mobilenetv3_small_050 timm:mobilenetv4_conv_small_035 timm:mixer_s32_224 torchvision:resnet18
cifar:resnet8-s2""".split(), *"""
timm:vit_base_patch16_224.mae timm:vit_medium_patch16_reg4_gap_256 timm:deit3_small_patch16_224
timm:vit_base_patch14_dinov2.lvd142m timm:vit_large_patch14_clip_336.openai timm:convnextv2_tiny
timm:vit_small_patch16_dinov3.lvd1689m timm:eva02_base_patch14_224 timm:resnetrs50 timm:resnet101
timm:swin_base_patch4_window7_224 timm:swinv2_tiny_window8_256 timm:regnety_032 timm:mixer_b16_224
timm:efficientnet_b4 timm:tf_efficientnetv2_s timm:mobilenetv3_large_100 torchvision:resnet152
open_clip:ViT-L-14-336-quickgelu/openai open_clip:RN101-quickgelu/openai open_clip:convnext_base
open_clip:ViT-B-16-SigLIP/webli open_clip:EVA02-B-16 open_clip:coca_ViT-B-32""".split() * SLOW]


def network(label, rough=False):
    """(network, images for it).  rough: with random numbers where a fresh one has zeros and ones,
    for a scale of 0 would hide a block."""
    torch.manual_seed(0)
    net = timm.create_model(label, num_classes=7, **SMALL[label]) if label in SMALL else (
        erpm.build(label, 7, "random"))
    with torch.no_grad():
        for p in net.parameters() if rough else ():
            if p.ndim < 2 or not p.any():
                p.normal_(0.5, 0.3)
    return net.eval(), images(2, 224 if label in SMALL else net.card.size_px or 64)


@pytest.mark.parametrize("label", NETWORKS)
def test_stages_equal_the_network_exactly(label):
    net, x = network(label, rough=True)
    x, parts = x / 255, erpm.stages(net)
    with torch.no_grad():
        z = net(x)
        assert torch.equal(parts(x), z)
    ours, theirs = ({id(p) for p in m.parameters()} for m in (parts, net))
    assert ours == theirs and z.shape == (2, 7) and z.std() > 0 and z.isfinite().all()
    assert len(parts) >= 4 and parts[-1].fc.out_features == 7


@pytest.mark.parametrize("label", ["timm:test_vit", "timm:test_efficientnet", "open_clip:tiny-rn",
                                   "open_clip:tiny-timm", "swin_tiny_patch4_window7_224",
                                   "eva02_tiny_patch14_224"])
def test_a_student_trains_predicts_and_is_loaded_again_on_every_family(label, tmp_path):
    net, x = network(label)
    student = erpm.Student(net, 2, 1, 0.3)
    frozen = nn.ModuleList([student.backbone, student.original])
    kept = copy.deepcopy(frozen.state_dict())
    sum(F.cross_entropy(z, torch.tensor([0, 6])) for z in student.train()(x)).backward()
    assert all(p.grad is not None for p in student.tuned.parameters())
    torch.optim.SGD(student.tuned.parameters(), 0.01).step()
    p = student.eval().predict(x, passes=3)
    assert equal(frozen, kept) and p.probs.shape == (2, 7) and (p.sigma > 0).any()
    erpm.save(tmp_path / "model.safetensors", student)
    other = None if isinstance(net, erpm.Net) else network(label)[0]
    if other:                                                  # a module of one's own
        with refuses("safetensors', net=MODULE)"):
            erpm.load(tmp_path)
    again = erpm.load(tmp_path, net=other).predict(x, passes=3)
    assert torch.allclose(again.probs, p.probs, atol=1e-5)     # other memory, other kernels
    assert torch.allclose(again.sigma, p.sigma, atol=1e-5)


def test_stages_that_give_something_else_are_refused(monkeypatch):
    before, rest = erpm.CUTS["torchvision.ResNet"]
    monkeypatch.setitem(erpm.CUTS, "torchvision.ResNet", (before, lambda n, x: rest(n, x) + 1))
    with refuses("the stages of torchvision:resnet18 do not give what it gives"):
        erpm.Student(erpm.build("torchvision:resnet18", 3), 1, 1)


@pytest.mark.parametrize("name, size_px, view, mean", [
    ("torchvision:mobilenet_v2/IMAGENET1K_V2", 0, erpm.View(224, 224 / 232), 0.485),
    ("timm:vit_tiny_patch16_224.augreg_in21k", 48, erpm.View(48, 0.9, "bicubic"), 0.5),
    ("torchvision:resnet18", 96, erpm.View(96), 0.485), ("cifar:resnet8", 96, erpm.View(96), 0.5),
    ("open_clip:tiny", 0, erpm.View(32, 1.0, "bicubic"), 0.4815),
    ("open_clip:ViT-B-16-SigLIP", 0, erpm.View(32, 1.0, "bicubic", True), 0.5),
    ("open_clip:ViT-B-16-SigLIP/webli", 0, erpm.View(32, 1.0, "bicubic", True), 0.5)])
def test_a_name_says_normalisation_view_and_size(name, size_px, view, mean, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16-SigLIP", TINY_CLIPS["tiny"])
    net, seen = erpm.build(name, 5, "random", size_px=size_px), []
    assert (net.card.n_classes, net.card.size_px, net.card.view) == (5, view.size_px, view)
    assert net.mean[0].item() == pytest.approx(mean, abs=1e-4) and not net.training
    net.net.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[-1]))
    assert net(images(2, 40)).shape == (2, 5) and seen == [view.size_px]


def test_weights_that_want_quickgelu_get_it(monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", TINY_CLIPS["tiny-avg"])
    for tag, want in (("", False), ("/openai", True), ("/laion2b_e16", False)):
        clip = erpm.clip_model(f"ViT-B-32{tag}", "random")
        assert any(type(m).__name__ == "QuickGELU" for m in clip.modules()) == want


@pytest.mark.parametrize("name", ["timm:test_vit", "cifar:resnet8-s2"])
@pytest.mark.parametrize("form", [
    None, lambda s: s, lambda s: {"model": s, "optimizer": {"lr": 0.1}},
    lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_a_file_of_any_form_brings_its_classifier_or_gets_a_new_one(name, form, tmp_path):
    net, file = network(name)[0], str(tmp_path / ("w.pth" if form else "w.safetensors"))
    x = images(2, net.card.view.size_px)
    if form:                                            # older versions of torch did not count
        torch.save(form({k: v for k, v in net.net.state_dict().items() if "num_b" not in k}), file)
    else:
        erpm.save(file, net)
    for classes in (7, None):                           # NAME=FILE: the file's own number
        same = erpm.build(name, classes, file)
        assert same.card.n_classes == 7 and not same.card.fresh
        assert torch.allclose(same(x), net(x), atol=1e-5)
    other = erpm.build(name, 3, file)
    assert other.card.fresh and other.card.n_classes == 3 and other(x).shape == (2, 3)
    assert torch.equal(erpm.frozen_features(other)(x), erpm.frozen_features(net)(x))


@pytest.mark.parametrize("form, says", [
    (lambda s: {"args": Path("x"), "model": s}, "nothing is unpickled here"),
    (lambda s: {"epoch": 3}, "holds no state dict but epoch"),
    (lambda s: s | {"more": torch.ones(1)}, "does not fit cifar:resnet8"),
    (lambda s: {k: v for k, v in s.items() if k != "1.conv1.weight"}, "1.conv1.weight"),
    (None, "is no file of plain tensors")])
def test_a_file_of_anything_else_is_refused(form, says, tmp_path):
    file = tmp_path / "w.pth"
    file.write_bytes(b"not weights")
    if form:
        torch.save(form(erpm.build("cifar:resnet8", 7).net.state_dict()), file)
    with refuses(says):
        erpm.build("cifar:resnet8", 7, file)


def test_the_weights_of_an_encoder_alone_leave_a_new_classifier(tmp_path):
    file, x, encoder = str(tmp_path / "w.pth"), images(1, 160), erpm.build("timm:test_vit", 0)
    torch.save(encoder.net.state_dict(), file)
    for n in (3, None, 0):
        net = erpm.build("timm:test_vit", n, file)
        assert (net.card.n_classes, net.card.fresh) == (n or 0, n == 3)
        assert torch.equal(erpm.frozen_features(net)(x), encoder(x))


def test_weights_of_a_tag_with_other_classes_come_with_a_new_classifier(monkeypatch):
    theirs, name = erpm.torchvision.models.mobilenet_v3_small(), "mobilenet_v3_small/IMAGENET1K_V1"
    fetch = Mock(side_effect=lambda **kw: dict(theirs.state_dict()))
    monkeypatch.setattr(erpm.torchvision.models.WeightsEnum, "get_state_dict", fetch)
    one, five = (erpm.build(f"torchvision:{name}", n) for n in (None, 5))
    assert equal(one.net, theirs) and equal(five.net.features, theirs.features)
    assert (one.card.n_classes, one.card.fresh) == (1000, False)
    assert (five.card.n_classes, five.card.fresh) == (5, True)
    fetch.side_effect = OSError("no\nroute")
    with refuses(f"{name} could not be had (OSError: no route): without a network give its w"):
        erpm.build(f"torchvision:{name}")


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


def dropouts(module):
    return [m for m in module.modules() if isinstance(m, erpm.Dropout)]


@pytest.mark.parametrize("head", [0, 1, 2])
def test_before_tuning_every_head_is_the_original_network(head):
    s, x = student(head=head), torch.rand(4, 3, 32, 32)
    for z in (*s(x), s.original(s.backbone(x))):
        assert torch.equal(z, erpm.Net(tiny_net())(x))
    assert torch.equal(s(images(4)).clean, erpm.Net(tiny_net())(images(4)))


def test_clean_head_sees_no_augmented_image_and_robust_head_no_clean_one():
    s, f = moved(student()), torch.rand(6, 8, 16, 16)
    z = s.tuned(f, 2)
    assert [len(h) for h in z] == [2, 6, 4]
    assert torch.allclose(z.clean, s.tuned(f[:2]).clean)
    assert torch.allclose(z.robust, s.tuned(f[2:]).robust)


@pytest.mark.parametrize("kind, n", [("chain", 7), ("timm:test_vit", 15), ("open_clip:tiny", 11)])
def test_dropout_is_live_where_a_pretrained_network_has_none(kind, n):
    net = tiny_net() if kind == "chain" else erpm.build(kind, 5)
    drops = dropouts(erpm.Student(net, 2, 1, 0.3).tuned)     # of a ViT in the residual branches
    assert len(drops) == n and all(d.p == 0.3 for d in drops)
    assert len(dropouts(erpm.Student(net, 2, 1, 0.3, dropout_in="head").tuned)) == 3


@pytest.mark.parametrize("norms", ["frozen", "own"])
def test_the_frozen_part_stays_equal_bit_for_bit(norms):
    s = student()
    before = copy.deepcopy(s.state_dict())
    erpm.distill(s, tiny_net(), shown(), epochs=1, batch=8, augment="augmix", norms=norms)
    changed = {k for k, v in s.state_dict().items() if not torch.equal(v, before[k])}
    learned = {f"tuned.{k}" for k, _ in s.tuned.named_parameters()}
    statistics = {k for k in before if k.startswith("tuned.")} - learned
    assert changed == learned | (statistics if norms == "own" else set())


def test_the_losses_are_those_of_equations_3_and_4():
    def slow(z, zt, y, a, t, smooth):
        p, q = (zt / t).softmax(1), (z / t).softmax(1)
        target = F.one_hot(y, 5) * (1 - smooth) + smooth / 5
        ce = -(target * z.softmax(1).log()).sum(1).mean()
        return (1 - a) * ce + a * t * t * (p * (p / q).log()).sum(1).mean()
    a, combined, b, z0, zt = (torch.randn(n, 5) for n in (4, 8, 4, 4, 4))
    y, options = torch.tensor([0, 1, 2, 3]), {"alpha": 0.4, "t": 3.0, "smoothing": 0.2}
    parts = erpm.erpm_loss(erpm.Heads(a, combined, b), z0, zt, y, **options)
    pairs = (a, z0), (combined[:4], z0), (b, zt), (combined[4:], zt)
    want = sum(slow(z, teacher, y, 0.4, 3.0, 0.2) for z, teacher in pairs)
    assert torch.isclose(sum(parts.values()), want)


def test_student_and_teacher_see_the_same_augmented_pixels():
    s, teacher, seen = student(), erpm.Net(tiny_net()).eval(), {}
    for m in (s.backbone, teacher):
        m.register_forward_pre_hook(lambda m, a: seen.update({m: a[0]}))
    x, y = images(6), torch.arange(6) % 5
    see = erpm.frozen_views(s.backbone, erpm.Robustify(augment="augmix"), True, s.original, teacher)
    erpm.erpm_step(erpm.Distill(), see)(s.tuned, erpm.Batch(x, y, erpm.rng(0)))
    hard = seen[teacher]
    assert torch.equal(seen[s.backbone], torch.cat([x, hard])) and not torch.equal(hard, x)


@pytest.mark.parametrize("where", ["tail", "head", "vit"])
def test_batched_passes_equal_one_pass_after_another(where, monkeypatch):
    monkeypatch.setattr(erpm, "slices", lambda x, size: [slice(0, 2), slice(2, 3)])
    s = moved(student(dropout_in=where) if where != "vit" else erpm.Student(
        erpm.build("timm:test_vit", 5), 2, 1, 0.3)).eval()
    f, t = s.backbone(torch.rand(3, 3, 32, 32)), 4
    mean, sigma, z = s.moments(f, t)
    masks, alone = [d.masks for d in dropouts(s)], []
    for i in range(t):
        for d, m in zip(dropouts(s), masks):
            d.masks = m[i:i + 1]
        alone.append(s.moments(f, 1))
    each, _, logits = map(torch.stack, zip(*alone))
    assert torch.allclose(each.mean(0), mean) and torch.allclose(logits.mean(0), z, atol=1e-5)
    tops = each.gather(3, mean.argmax(-1, True).expand(t, -1, -1, -1))[..., 0]
    assert torch.allclose(tops.std(0, correction=0)[:, ::2], sigma, atol=1e-5) and sigma.min() > 0
    assert all(d.sample is None for d in dropouts(s))


@pytest.mark.parametrize("ids", [None, [[4, 4], [0, 3], [2, 2]]])
def test_closed_form_is_the_limit_of_many_passes(ids):
    s = moved(student(tune=2, head=2, dropout=0.01, dropout_in="head"))
    f, ids = s.backbone(torch.rand(16, 3, 32, 32)), ids and torch.tensor(ids)
    p0, s0, z0 = s.moments(f, 0, ids)
    p1, s1, z1 = s.moments(f, 4000, ids)
    assert torch.allclose(s0, s1, rtol=0.1, atol=1e-4) and torch.allclose(p0, p1, atol=1e-2)
    assert torch.allclose(z0, z1, atol=0.05) and s0.min() > 0


def test_each_rule_picks_the_head_worked_by_hand():
    mean = torch.tensor([[[.8, .1, .1], [.7, .2, .1], [.4, .5, .1]],      # clean sits near combined
                         [[.9, .05, .05], [.1, .8, .1], [.1, .85, .05]]])  # robust does
    sigma, logits = torch.tensor([[.1, .2]] * 2), torch.tensor([[[1.], [9], [2]]] * 2)
    for rule, heads in {"kl": [0, 2], "sigma": [0, 0], "product": [0, 2], "sum": [0, 2],
                        "soft": [0, 2], "entropy": [0, 0], "max-logit": [2, 2],
                        "clean": [0, 0], "combined": [1, 1], "robust": [2, 2]}.items():
        assert erpm.select(mean, sigma, rule, logits=logits).tolist() == heads, rule
    for y, heads in (([1, 0], [2, 0]), ([2, 2], [0, 0])):
        assert erpm.select(mean, sigma, "oracle", y=torch.tensor(y)).tolist() == heads
    assert erpm.select(mean, 0 * sigma).tolist() == [0, 2]      # saturated: the KL alone decides


def test_soft_mixes_by_the_inverse_of_sigma_times_the_kl_to_the_combined_head():
    mean, sigma = torch.rand(2, 3, 4).softmax(-1), torch.tensor([[.1, .3], [.2, .1]])
    kl = torch.tensor([[(m[h] * (m[h] / m[1]).log()).sum() for h in (0, 2)] for m in mean])
    assert torch.allclose(erpm.divergence(mean), kl, atol=1e-6)
    w = 1 / (sigma * kl)
    w = w / w.sum(1, keepdim=True)
    want = w[:, :1] * mean[:, 0] + w[:, 1:] * mean[:, 2]
    assert torch.allclose(erpm.answer(mean, sigma, torch.zeros(2).long(), "soft"), want, atol=1e-5)


# ==== training ====

def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [erpm.lr_at(i, 100, 10, 1.0) for i in range(101)]
    assert rates[0] > 0 and max(rates) == rates[10] == 1 and rates[100] == pytest.approx(0)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def quick_fit(step=erpm.plain_step(erpm.Train()), model=None, **cfg):
    model, cfg = model or erpm.Net(tiny_net()), {"epochs": 2, "batch": 16, "lr": 1e-3, **cfg}
    erpm.fit(model, step, shown(n=64).training(0), erpm.Train(**cfg),
             erpm.Runtime(amp="none", log_every=1), name="t", seed=0)
    return model


def test_accumulated_micro_batches_equal_one_batch():
    parts = []
    for accum in (1, 4):
        backbone, tail = erpm.cut(erpm.Net(tiny_net()), 2)
        step = erpm.plain_step(erpm.Train(), erpm.frozen_views(backbone))
        parts.append(quick_fit(step, erpm.Tuned(tail.requires_grad_(True)), accum=accum))
    for p, q in zip(*(part.parameters() for part in parts)):
        assert torch.allclose(p, q, atol=2e-5)


def test_averaged_weights_are_the_ones_kept():
    states = []

    def step(model, batch):
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return erpm.plain_step(erpm.Train())(model, batch)
    states.append(quick_fit(step).state_dict())
    kept, (first, *rest) = quick_fit(ema=0.7).state_dict(), states[1:]
    for k, v in first.items():
        for s in rest:
            v = 0.7 * v + 0.3 * s[k]
        assert "num_batches" in k or torch.allclose(v, kept[k], atol=1e-6)


def test_weight_decay_spares_biases_and_norms_and_clip_bounds_the_step():
    for name in ("adamw", "sgd"):
        opt = erpm.make_optimizer(tiny_net(), erpm.Train(optimizer=name, weight_decay=0.5))
        decays = {g["weight_decay"]: {p.ndim for p in g["params"]} for g in opt.param_groups}
        assert decays == {0.0: {1}, 0.5: {2, 4}}
    loud = lambda m, b: (1e6 * m(b.x).square().mean(), {})                     # noqa: E731
    net = quick_fit(loud, clip=0.01, optimizer="sgd", weight_decay=0.0, epochs=0.25, lr=1.0,
                    warmup=0)
    after, before = (nn.utils.parameters_to_vector(n.parameters()) for n in (net, tiny_net()))
    gap = (after - before).norm().item()
    assert gap == pytest.approx(0.01 * 1.9, rel=1e-3)                         # Nesterov: 1 + 0.9


# ==== evaluation ====

def slow_figures(p, y):
    """Counts, NLL and calibration error of probabilities: by sorting, and bin by bin."""
    ranks = np.array([sorted(range(len(row)), key=lambda k: (-row[k], k)).index(label)
                      for row, label in zip(p.tolist(), y.tolist())])
    confidence, edges, ece = p.amax(1).double().numpy(), torch.linspace(0, 1, 16).numpy(), 0
    for lo, hi in zip(edges[:-1], edges[1:]):
        inside = (lo < confidence) & (confidence <= hi)
        ece += abs((ranks[inside] == 0).sum() - confidence[inside].sum()) / len(p)
    nll = -p.double()[range(len(y)), y].log().mean().item()
    return {"correct": (ranks == 0).sum(), "correct5": (ranks < 5).sum(),
            "nll": pytest.approx(nll, abs=2e-5), "ece": pytest.approx(ece, abs=2e-6)}


def test_figures_of_a_plain_network_are_those_of_a_slow_loop():
    ids = torch.tensor([[0, 3]] + [[k, k] for k in (1, 2, 4, 5, 6, 7, 8)] + [[9, 10]])
    data = shown(9, 60, ids=ids)
    z = (3 * torch.randn(60, 11, generator=erpm.rng("z"))).round() / 2               # many ties
    want = slow_figures(erpm.project(z, ids).softmax(-1), torch.tensor(data.y))
    for batch in (60, 7):
        parts = iter(z.split(batch))
        found = erpm.evaluate(lambda x: next(parts), data, batch=batch, amp="none")
        assert found == {"n": 60, **want}


@pytest.mark.parametrize("passes", [4, 0])
def test_figures_of_every_rule_are_those_of_a_slow_loop(passes):
    s, data = moved(student()), shown(5, 50)
    y, f = torch.tensor(data.y), s.backbone(data.images)
    got = erpm.evaluate(s, data, batch=16, passes=passes, amp="none")
    assert len(got["rules"]) == len(erpm.RULES) + 2 * bool(passes)
    for name, found in got["rules"].items():
        rule, _, of = name.partition(" (")
        mean, sigma, logits = s.moments(f, {"": passes, "closed form)": 0, "3 passes)": 3}[of])
        head = erpm.select(mean, sigma, rule, logits=logits, y=y)
        assert found == {**slow_figures(erpm.answer(mean, sigma, head, rule), y),
                         "heads": torch.bincount(head, minlength=3).tolist()}


def test_tensors_loaders_sets_and_cells_are_scored_alike():
    net, x, y = erpm.Net(tiny_net()), images(30), torch.arange(30) % 5
    want = erpm.evaluate(net, (x, y))
    assert want["n"] == 30 and want == erpm.evaluate(net, DataLoader(TensorDataset(x, y), 7))
    assert want == erpm.evaluate(net, TensorDataset(x / 255, y))          # floats, as of ToTensor
    assert want == erpm.evaluate(lambda x: net(x), (x, y))
    cell = erpm.evaluate(net, (x, y), ("contrast", 4), batch=8, amp="none")
    same = erpm.evaluate(net, (erpm.corrupt(x, "contrast", 4, jpeg=True), y), amp="none")
    assert cell == same and cell["nll"] != want["nll"]


def test_a_linear_probe_is_where_the_gradient_of_its_loss_is_zero(monkeypatch):
    g, y = erpm.rng("blobs"), torch.arange(90) % 3
    x = torch.randn(3, 4, generator=g)[y] + torch.randn(90, 4, generator=g)
    x = x * torch.tensor([1.0, 10, 0.1, 1]) + 5
    noisy = torch.cat([x, torch.randn(90, 200, generator=erpm.rng("noise"))], 1)
    assert erpm.linear_probe(noisy, y, 3)[1] > min(erpm.PROBE_L2)       # as a held-out tenth wants
    monkeypatch.setattr(erpm, "PROBE_L2", [0.01])
    fc, _ = erpm.linear_probe(x, y, 3)
    penalty = (fc.weight * x.std(0, correction=0)).square().sum()
    loss = F.cross_entropy(fc(x), y) + 0.01 / 2 * penalty                            # convex
    assert all(g.abs().max() < 1e-4 for g in torch.autograd.grad(loss, tuple(fc.parameters())))


# ---- rows: any network on any set ----

@pytest.fixture(scope="module")
def three_networks(tmp_path_factory):
    """A Student and a plain network of shapes, a file of unknown origin, and a set of two images;
    what one process makes of them."""
    cwd, net = tmp_path_factory.mktemp("any"), erpm.build("cifar:resnet8-s2", 10)
    saved(cwd / "p/model.safetensors", net)
    torch.save(net.net.state_dict(), cwd / "foreign.pth")
    saved(cwd / "s/model.safetensors", moved(erpm.Student(net, 2, 1, 0.2)))
    make_tree(cwd / "two", n=1)
    words = ["eval", "--model", "run:s,P@run:p,cifar:resnet8-s2=foreign.pth", "--set",
             "shapes,2@folder:two", "data.n_test=40", "data.n_train=40", "eval.batch=16",
             "eval.passes=2", "data.size_px=32", "runtime.amp=none"]
    with contextlib.chdir(cwd):
        runs(*words, "out=one")
    return cwd, words


def test_other_classes_are_probed_alike_on_any_number_of_processes(three_networks, monkeypatch):
    cwd, words = three_networks
    monkeypatch.chdir(cwd)
    in_processes(2, *words, "out=2")
    rows, unknown = untimed("one/models"), "cifar:resnet8-s2=foreign.pth, linear probe"
    assert {r["processes"] for r in result_rows("2/models")} == {2} and untimed("2/models") == rows
    assert {(r["label"], r["set"], r["kind"], r["n"], r["passes"]) for r in rows} == {
        ("run:s", "shapes", "home", 40, 2), ("run:s, linear probe", "2", "transfer", 2, None),
        ("P", "shapes", "home", 40, None), ("P, linear probe", "2", "transfer", 2, None),
        (unknown, "shapes", "transfer", 40, None), (unknown, "2", "transfer", 2, None)}
    assert len(rows) == 6 and set(rows[0]["rules"]) > {*erpm.HEADS} and "rules" not in rows[1]


def test_an_interrupted_eval_goes_on_to_the_same_rows(three_networks, monkeypatch):
    cwd, words = three_networks
    monkeypatch.chdir(cwd)
    jobs = [DEFAULT] * 3 + [KeyboardInterrupt] + [DEFAULT]               # and no sixth
    monkeypatch.setattr(erpm, "evaluate_all", Mock(wraps=erpm.evaluate_all, side_effect=jobs))
    assert erpm.main([*words, "out=half"]) == 130
    with open("half/models/results.jsonl", "a") as file:
        file.write('{"label": "a row cut off by a crash')
    for _ in range(2):                                  # a finished eval computes no figure,
        runs(*words, "out=half")
        assert untimed("half/models") == untimed("one/models")
        monkeypatch.setattr(erpm, "linear_probe", None)                  # and fits no probe


def test_each_cell_has_images_of_its_own_and_always_the_same(here, monkeypatch):
    seen = []
    monkeypatch.setattr(erpm, "evaluate_all", lambda models, images, cell, **_: seen.append(
        tuple(images.index)) or {x: {"n": 5} for x in models})
    shapes = erpm.open_set("shapes-c", erpm.Data(n_test=60))
    for run in ("a", "b"):
        cfg = erpm.resolve([*TINY, "eval.n_cell=5", f"run={run}"])
        erpm.score({"x": erpm.build("cifar:resnet8-s2", 10)}, shapes, cfg)
    assert seen[:75] == seen[75:] and len(set(seen)) == 75 and set(map(len, seen)) == {5}
    assert {i for cell in seen for i in cell} == set(range(60))


def test_what_makes_another_figure_makes_a_new_row_and_nothing_else_does(here, monkeypatch):
    def rows_after(words=""):
        runs("eval", "--model", "run:q", "--set", "folder:four", "out=kept", "data.size_px=32",
             *words.split())
        return len(result_rows("kept/models"))
    make_tree(here / "four", "abcd", n=3)
    saved(here / "q/model.safetensors", erpm.build("cifar:resnet8-s2", 10))
    for words, n in (("", 1), ("eval.batch=7 data.workers=1", 1), ("seed=1", 2),
                     ("data.n_test=9", 3), ("eval.rule=kl", 3), ("data.fit=squash", 4)):
        assert rows_after(words) == n
    saved(here / "q/model.safetensors", erpm.build("cifar:resnet8-s2", 10))      # other weights
    assert rows_after() == 5
    monkeypatch.setattr(erpm, "versions", lambda: {"erpm": "other"})
    assert rows_after() == 6


@pytest.mark.parametrize("home, name, kind", [
    ("shapes", "shapes", "home"), ("shapes", "shapes-r", "shift"), ("shapes", "shapes-c", "shift"),
    ("folder:b", "folder-c:b", "shift"), ("folder:b", "c@folder:c", "shift"),
    ("shapes", "folder:a", "transfer"), ("cifar10", "shapes", "transfer"),
    ("", "shapes", "transfer"), ("folder:b", "folder:d", "transfer")])
def test_a_network_answers_itself_on_its_own_classes_alone(here, home, name, kind, monkeypatch):
    for folder, names in {"a": [*erpm.SHAPES][::-1], "b": ("cat", "dog"), "c": ("cat", "dog"),
                          "d": ("cat", "emu")}.items():
        make_tree(here / folder, names, n=1)
    monkeypatch.setattr(erpm, "fit_probe", lambda f, images, cfg: nn.Linear(64, 10))
    cfg = erpm.resolve(["data.size_px=32", "data.n_test=4", "data.n_train=20"])
    known = {"shapes": tuple(erpm.SHAPES), "folder:b": ("cat", "dog"), "": (),
             "cifar10": tuple("0123456789")}[home]          # as many as shapes has, and others
    net, s = erpm.build("cifar:resnet8-s2", len(known) or 10), erpm.open_set(name, cfg.data)
    net.card = dataclasses.replace(net.card, classes=known, home=home)
    assert erpm.kind_of(net.card, s) == kind
    label, answering = erpm.headed("x", net, name, s, cfg)
    assert (label, answering is net) == (
        ("x, linear probe", False) if kind == "transfer" else ("x", True))


def test_all_scores_what_is_there_and_refuses_what_is_half_there(three_networks, here, capsys):
    torch.save(erpm.build("torchvision:shufflenet_v2_x0_5", 3).net.state_dict(), "w.pth")
    foreign = f"N@cifar:resnet8-s2={three_networks[0]}/foreign.pth"
    words = ["eval", "--set", "all", "data.n_test=10", "data.n_train=100", "--model",
             f"{foreign},mine@torchvision:shufflenet_v2_x0_5=w.pth"]
    out, rows = runs(*words), result_rows("runs/models")
    assert {r["set"] for r in rows} == {"shapes", "shapes-r", "shapes-c"} and len(rows) == 77
    assert {r["label"] for r in rows} == {"N, linear probe"}
    assert all(f"left out: {n} is not there" in out for n in ("fashion-mnist", "imagenet-a"))
    assert "left out: mine: its classes are not those of shapes, and a linear probe c" in out
    make_tree(here / "data/imagenet-a", erpm.synsets("a")[:2], n=1, splits=("",))
    assert "imagenet-a: 2 images of 200 classes in data/imagenet-a, ex" in fails(capsys, *words)
    runs("eval", "--set", "shapes", "--model", foreign, "eval.head=own", "out=own")
    assert [r["label"] for r in result_rows("own/models")] == ["N"]     # its user says so


def test_a_network_sees_its_own_view_by_any_name_and_is_no_team_on_other_classes(here):
    for file in ("student", "teacher"):
        saved(here / f"runs/x/{file}.safetensors", erpm.build("cifar:resnet8-s2", 2), "folder:odd",
              classes=("cat", "dog"), view=erpm.View(32, 0.9, "bicubic"), label=file)
    (here / "runs/x/config.yaml").write_text("data: {name: 'folder:odd'}")
    make_tree(here / "odd", n=8, size=(41, 67))
    make_tree(here / "two", "ab", n=1)
    runs("eval", "--run", "runs/x", "--set", "folder:odd,folder:two", "runtime.amp=none")
    rows, file = result_rows("runs/x"), "runs/x/student.safetensors"
    assert [r["label"] for r in rows] == ["student", "teacher", "student + teacher",
                                          "student, linear probe", "teacher, linear probe"]
    for net in (erpm.load(file), erpm.build("cifar:resnet8-s2", weights=file)):
        want = erpm.evaluate(net, "folder:odd", amp="none")
        assert want["n"] == 16 and {k: rows[0][k] for k in want} == want


# ---- zero-shot ----

def test_the_three_heads_tune_a_projection_each_and_share_the_text():
    text = erpm.TextHead(torch.randn(4, 64, generator=erpm.rng("text")), math.log(8.0))
    net, x = nn.Sequential(*tiny_net(64), text).eval(), images(6)
    s = erpm.Student(net, 3, 1, 0.02).eval()
    assert all(torch.equal(z, erpm.Net(net)(x)) for z in s(x))
    assert all(torch.equal(s.tuned.heads[h][-1].fc.weight, text.weight) for h in erpm.HEADS)
    assert len({id(p) for h in erpm.HEADS for p in s.tuned.heads[h].parameters()}) == 6


@pytest.mark.parametrize("kind", ["tiny", "tiny-rn", "tiny-timm"])
def test_zero_shot_logits_equal_open_clips_own_path(kind, tmp_path, monkeypatch):
    torch.manual_seed(0)
    file, clip, x = str(tmp_path / "clip.pt"), erpm.clip_model(kind), images(3, 40)
    torch.save({"state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, file)
    names, templates = ("star", "half disc", "{ring}"), open_clip.OPENAI_IMAGENET_TEMPLATES[:5]
    weight = open_clip.build_zero_shot_classifier(clip, open_clip.get_tokenizer(kind), names,
                                                  templates)
    makes = Mock(side_effect=open_clip.create_model)     # built once, its file read once
    reads = Mock(side_effect=timm.models.load_state_dict)
    monkeypatch.setattr(open_clip, "create_model", makes)
    monkeypatch.setattr(timm.models, "load_state_dict", reads)
    net = erpm.build(f"open_clip:{kind}", names, file, templates=[t("{}") for t in templates])
    assert makes.call_count == reads.call_count == 1
    with torch.no_grad():
        want = clip.logit_scale.exp() * clip.encode_image(net.prepare(x), normalize=True) @ weight
        want = want if clip.logit_bias is None else want + clip.logit_bias
        assert torch.allclose(net(x), want, rtol=0, atol=2e-6) and want.std() > 1e-3
        erpm.save(tmp_path / "tower.safetensors", erpm.build(f"open_clip:{kind}", None, file))
        again = erpm.zero_shot(erpm.load(tmp_path / "tower.safetensors"), net.card.prompts)
        assert torch.equal(again(x), net(x))
    with refuses("open_clip:tiny-avg"):                 # strictly
        erpm.build("open_clip:tiny-avg", names, file)


def test_prompts_come_from_imagenet_the_folder_names_or_a_file(here):
    fish = ("n01443537", "n01440764")
    names, templates = erpm.prompts_of(erpm.ImageSet("x", [0], fish, outputs=erpm.synsets()))
    assert list(names) == list(open_clip.IMAGENET_CLASSNAMES)
    assert templates == tuple(t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES)
    assert erpm.prompts_of(erpm.ImageSet("x", [0], fish))[0] == ("goldfish", "tench")
    own = erpm.ImageSet("z", [0, 1], ["polar_bear", "half-disc"], images=images(2))
    assert erpm.prompts_of(own) == (("polar bear", "half disc"), ("a photo of a {}.",))
    put_files(here, {"n": "thing 1\nthing_2\n", "t": "one {}\n\ntwo {}\n", "bad": "no place\n"})
    assert erpm.prompts_of(own, "t", "n") == (("thing 1", "thing_2"), ("one {}", "two {}"))
    with refuses("model.templates: expected lines with one {}"):
        erpm.prompts_of(own, "bad")


CLIP = [*TINY, "model.head=text", "model.student=open_clip:erpm-tiny", "distill.tune=1",
        "eval.sets=shapes,shapes-r", "compare.rows="]


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("clip")
    with contextlib.chdir(cwd):
        runs("demo", "run=z", *CLIP)
    return cwd


def test_a_text_demo_scores_zero_shot_and_keeps_the_frozen_towers(clip_run, monkeypatch):
    monkeypatch.chdir(clip_run)
    rows = {(r["label"], r["set"]): r for r in result_rows("runs/z")}
    assert set(rows) == {(label, s) for s in ("shapes", "shapes-r") for label in (
        "original", "teacher", "ERPM", "original + teacher", "ERPM + teacher")}
    first, s, x = erpm.load("runs/z/student.safetensors"), erpm.load("runs/z"), images(4)
    found = erpm.evaluate(s, erpm.open_set("shapes", erpm.Data(n_test=20)), amp="none", passes=3)
    assert found["rules"] == rows["ERPM", "shapes"]["rules"]
    assert s.card.prompts[0] == tuple(erpm.SHAPES) and not torch.equal(s(x).clean, first(x))
    assert torch.equal(s.original(s.backbone(x)), first(x))


def test_a_student_names_new_classes_with_its_own_text_tower(clip_run, here):
    run, names = shutil.copytree(clip_run / "runs/z", here / "moved"), ("red ring", "blue arrow")
    make_tree(here / "pets", ("red_ring", "blue-arrow"), n=2, splits=("",))
    runs("eval", "--model", "S@run:moved", "--set", "pets@folder:pets", "data.size_px=32")
    assert [r["label"] for r in result_rows("runs/models")] == ["S, zero-shot"]
    s, prompts = erpm.load(run), (names, ("a photo of a {}.",))
    there, texts = erpm.zero_shot(s, prompts), [f"a photo of a {name}." for name in names]
    assert {id(p) for p in there.parameters()} == {id(p) for p in s.parameters()}
    towers = erpm.clip_model("erpm-tiny", str(run / "student.safetensors"))
    want = towers.encode_text(open_clip.get_tokenizer("erpm-tiny")(texts), True)
    assert torch.allclose(there.original[-1].fc.weight, want, atol=1e-6)
    (run / "student.safetensors").unlink()                   # what is embedded is kept
    assert equal(erpm.zero_shot(s, prompts), there) and s.card.n_classes == 10


def test_other_prompts_and_only_they_make_new_rows_and_another_training(clip_run, here, capsys):
    put_files(here, {"t.txt": "a drawing of the {}", "n.txt": "thing\n" * 10})
    model = f"open_clip:erpm-tiny={clip_run / 'runs/z/student.safetensors'}"
    for words, n in (("", 2), ("data.workers=0", 2), ("model.templates=t.txt", 4),
                     ("data.names=n.txt", 6)):
        runs("eval", "--model", model, "--set", "shapes,shapes-r", "data.n_test=10", *words.split())
        assert len(result_rows("runs/models")) == n
    shutil.copytree(clip_run / "runs/z", here / "runs/z")
    assert "made with other settings" in fails(capsys, "distill", "run=z", *CLIP, "--recipe",
                                               "demo", "model.templates=t.txt")


# ==== report ====

def fake_row(name="shapes", cell=("", 0), seed=0, label="ERPM", right=6, n=10, **more):
    """A row of results.jsonl: of a Student where the label is ERPM, else of a plain network."""
    kind = "home" if name in ("shapes", "imagenet") else "shift"
    row = {"label": label, "of": f"{label} {seed} {name}", "seed": seed, "run": f"r{seed}",
           "set": name, "kind": kind, "corruption": cell[0], "severity": cell[1], "n": n,
           "transform": "32 px", "rule": "product", "gflops": 3.0,
           "train": {"images": 100, "seconds": 1.0 + seed, "gflops": 50.0}}
    found = {"correct": right, "correct5": n - 1, "nll": 1.25, "ece": 0.125}
    if label != "ERPM":
        return row | found | more
    rules = {r: found | {"correct": right + (r == "robust"), "heads": [6, 0, 4]}
             for r in (*erpm.RULES, "product (closed form)")}
    rules["clean"]["heads"], rules["robust"]["heads"] = [n, 0, 0], [0, 0, n]
    return row | {"rules": rules} | more


def fake_rows(seeds=(0, 1), label="ERPM", **more):
    return [fake_row(name, cell, s, label, **{"right": 5 + s} | more) for s in seeds
            for name, cells in (("shapes", [("", 0)]), ("shapes-c", erpm.CELLS)) for cell in cells]


def lines_of(rows, title):
    """{heading: cells} of the table of the report whose title begins so."""
    after = erpm.report_text(rows).split(f"\n## {title}")[1].split("\n## ")[0]
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in after.splitlines()
             if line.startswith("| ") and not line.startswith("| -")]
    return {heading: rest for heading, *rest in cells}


@pytest.mark.parametrize("lost", [{"corruption": "fog", "severity": 3}, {}])
def test_what_misses_a_cell_or_a_seed_is_missing_and_never_a_smaller_mean(lost):
    lost = {"set": "shapes-c", "seed": 1, **lost}
    rows = [r for r in fake_rows() if not lost.items() <= r.items()]
    assert lines_of(rows, "Models")["ERPM"][:2] == ["55.00 ± 7.07", "missing"]
    assert lines_of(rows, "shapes-c by corruption")["fog"] == ["missing"]


def test_evaluations_never_mix_and_the_larger_one_counts_then_the_newer():
    old = fake_rows((0,), "x")
    new = [r | {"of": "new", "correct": 9} for r in old]
    small = [r | {"of": "small", "correct": 1, "n": 5} for r in old]
    assert lines_of(old + new, "Models")["x"][:2] == ["90.00", "90.00"]
    assert lines_of(old + new[:40], "Models")["x"][:2] == ["90.00", "missing"]
    assert lines_of(old + small, "Models")["x"][:2] == ["50.00", "50.00"]
    with refuses("r0 and other both hold x of seed 0"):
        erpm.report_text([*old, old[0] | {"run": "other"}])


def test_mce_is_that_worked_by_hand():
    errors = erpm.ALEXNET
    assert sum(errors.values()) / 15 == pytest.approx(0.789, abs=5e-4)
    rows = [fake_row("imagenet-c", (c, k), 0, "x", round(1e6 * (0.95 - errors[c])), 10 ** 6)
            for c, k in erpm.CELLS]
    table, by_hand = lines_of(rows, "Models"), sum(1 + 0.05 / e for e in errors.values()) / 15
    assert float(table["x"][table[""].index("mCE")]) == pytest.approx(100 * by_hand, abs=0.01)


@pytest.mark.parametrize("title, heading, cells", [
    ("Models", "ERPM", "60.00 40.00 60.00 20.00 10.00 0.25 0.50 3 1.50"),
    ("Models", "FT", "60.00 missing missing missing 80.00 1.00 1.00 3 1.50"),
    ("Models", "original", "60.00 missing missing missing - - - 2 1.00"),
    ("ERPM: which rule", "kl", "60.00 40.00 60.00 20.00 60.00 40.00 40.00 40.00"),
    ("ERPM: which rule", "product (closed form)",
     "60.00 40.00 60.00 20.00 60.00 40.00 40.00 40.00"),
    ("ERPM: which rule", "robust", "70.00 50.00 70.00 30.00 0.00 100.00 100.00 100.00"),
    ("Every model on every set", "ERPM on shapes", "60.00 90.00 1.250 12.50 -")])
def test_every_rule_and_measure_stands_in_the_report(title, heading, cells):
    rows = [*fake_rows((0,), right=6), fake_row("shapes-r", right=2),
            fake_row(label="original", gflops=2.0, train={}),
            fake_row(label="FT", train={"images": 50, "seconds": 4.0, "gflops": 100.0})]
    assert lines_of(rows, title)[heading] == cells.split()


def test_other_classes_and_qualified_names_are_other_columns():
    part, made = "shapes (10 of 20 images)", "shapes-c (regenerated)"
    rows = [fake_row(part, label="x", right=5, kind="home"), *fake_rows((0,), "x")[1:],
            *[fake_row(made, cell, 0, "x", 2) for cell in erpm.CELLS],
            *[fake_row(s, label="clip", kind="transfer") for s in (part, "sun397")],
            fake_row("flowers102", label="x, linear probe", right=8, kind="transfer")]
    assert lines_of(rows, "Transfer") == {"": ["sun397", "flowers102"], "clip": [
        "60.00", "missing"], "x, linear probe": ["missing", "80.00"]}
    models = lines_of(rows, "Models")
    assert models[""][:4] == [part, "mean of 2 shifts", "shapes-c", made]
    assert models["x"][:4] == ["50.00", "35.00", "50.00", "20.00"]
    assert lines_of(rows, f"{made} by corruption")["severity 5"] == ["20.00"]


def test_published_figures_and_clean_images_of_the_same_classes_stand_beside_ours():
    rows = [fake_row("imagenet", label="x"),
            *[fake_row("imagenet-c", cell, label="x") for cell in erpm.CELLS],
            *[fake_row(s, label="x") for s in ("imagenet-a", "imagenet-r")],
            fake_row("imagenet@a", label="x", right=9, kind="home")]
    table = lines_of(rows, "Models")
    assert list(zip(table[""], table["timm:resnet50.tv_in1k (published)"]))[:6] == [
        ("imagenet", "76.13"), ("imagenet@a", "missing"), ("mean of 3 shifts", "-"),
        ("imagenet-c", "-"), ("imagenet-a", "0.00"), ("imagenet-r", "36.17")]
    assert table["x"][:2] == ["60.00", "90.00"]
    assert "published" not in erpm.report_text(fake_rows())


def test_figures_show_the_numbers_of_the_tables_and_what_nothing_beats():
    rows = fake_rows() + fake_rows(label="net", right=4) + fake_rows(
        label="original", right=3, train={})
    drawn = figures(rows)
    line = drawn["severity.png"].axes[0].lines[0]
    steps = list(lines_of(rows, "shapes-c by corruption").values())[-5:]
    assert [f"{y:.2f}" for y in line.get_ydata()[1:]] == [v[0][:5] for v in steps]
    made = [r | {"set": r["set"].replace("-c", "-c (regenerated)")} for r in rows]
    again = figures(made)["severity.png"].axes[0].lines[0]
    assert again.get_ydata().tolist() == line.get_ydata().tolist() and line.get_ydata()[0] > 0
    [ax] = drawn["pareto.png"].axes
    points = [c.lines[0].get_xydata().tolist() for c in ax.containers]
    assert points == [[[0.025, pytest.approx(g)]] for g in (55, 40)] + [[[0, pytest.approx(30)]]]
    assert ax.lines[-1].get_xydata().tolist() == points[2] + 2 * points[0]


def test_pictures_show_what_the_head_that_answers_said(run_of_demo):
    cfg, student = erpm.resolve(["eval.rule=kl", "data.n_test=8"]), erpm.load(run_of_demo)
    shapes = erpm.open_set("shapes", cfg.data)
    x, y, _ = batch(shapes)
    said = student.predict(x, rule="kl")
    for i, ax in enumerate(erpm.pictures_of(run_of_demo, cfg).axes[:8]):
        k = said.probs[i].argmax()
        assert ax.get_title() == shapes.classes[y[i]] and ax.get_xlabel() == (
            f"{shapes.classes[k]} {said.probs[i, k]:.2f}\n{erpm.HEADS[said.head[i]]}")
        assert ax.xaxis.label.get_color() == ("darkgreen" if k == y[i] else "firebrick")


# ==== commands ====

DEMO = [*TINY, "data.n_train=80", "data.n_test=30", "eval.n_cell=4", "distill.epochs=1",
        "distill.ema=0.5", "distill.accum=2", "compare.rows=ERPM:\nTeam: distill.method=team"]


@pytest.fixture(scope="session", autouse=True)
def ahead(tmp_path_factory):
    """The demo, begun at once in a process of its own, while other tests run."""
    cwd = tmp_path_factory.mktemp("demo")

    def work():
        import matplotlib
        os.chdir(cwd)
        erpm.figures, matplotlib.rcParams["savefig.dpi"] = figures, 30   # to be quick
        Path("printed.txt").write_text(runs("demo", *DEMO))
    yield cwd, (job := forked(work))
    job.kill()


@pytest.fixture(scope="module")
def demo(ahead):
    cwd, job = ahead
    job.join(300)
    assert job.exitcode == 0
    return cwd, (cwd / "printed.txt").read_text()


@pytest.fixture
def run_of_demo(demo, here):
    """The demo's run in a new working directory."""
    return Path(shutil.copytree(demo[0] / "runs/demo", here / "runs/demo"))


def test_demo_leaves_everything_it_promises(demo, run_of_demo):
    run, rows = run_of_demo, result_rows(run_of_demo)
    assert {p.name for p in run.iterdir()} >= {
        *(f"{role}.safetensors" for role in ("student", "teacher", "model", "team")), "log.jsonl",
        "config.yaml", "results.jsonl", "report.md", "pictures.png", "severity.png", "pareto.png"}
    assert len(rows) == 6 * 77 and {r["set"] for r in rows} == {"shapes", "shapes-c", "shapes-r"}
    assert {r["label"] for r in rows} == {"original", "teacher", "ERPM", "Team",
                                          "original + teacher", "ERPM + teacher"}
    assert not list(run.glob("*.ckpt"))                                # once it is made
    assert erpm.resolve(file=run / "config.yaml") == erpm.configure(erpm.parse(["demo", *DEMO]))


def test_a_second_demo_computes_nothing_and_overwrites_nothing(run_of_demo, monkeypatch, capsys):
    before = {p.name: p.read_bytes() for p in run_of_demo.glob("[!.]*") if p.suffix != ".md"}
    for name in ("fit", "evaluate_all"):                                   # a call would fail
        monkeypatch.setattr(erpm, name, None)
    monkeypatch.setattr(erpm, "run_report", lambda *a: None)
    assert runs("demo", *DEMO).count("is there, kept") >= 4
    for stage, old in (("pretrain", 0.003), ("robustify", 0.004), ("distill", 0.002)):
        line = fails(capsys, stage, "--recipe", "demo", *DEMO, f"{stage}.lr=0.5")
        assert f"made with other settings ({stage}.lr: {old} -> 0.5)" in line
    assert all((run_of_demo / name).read_bytes() == old for name, old in before.items())


def test_pretrain_trains_everything_or_with_tune_0_a_linear_probe(here):
    net = saved(here / "w.safetensors", erpm.build("cifar:resnet8-s2", 7))
    for tune, same in ((-1, False), (0, True)):
        runs("pretrain", f"run=x{tune}", *TINY, f"pretrain.tune={tune}",
             "model.student_weights=w.safetensors")
        made = erpm.load(f"runs/x{tune}/student.safetensors")
        assert [equal(a, b) for a, b in zip(net.net[:4], made.net)] == [same] * 4
    s = erpm.open_set("shapes", erpm.Data(n_train=40), "train")
    with torch.no_grad():
        x, y = erpm.frozen_features(net)(s.images[s.index]), torch.from_numpy(s.y[s.index])
    assert torch.allclose(erpm.linear_probe(x, y, 10)[0].weight, made.net[-1].weight, atol=1e-5)


def test_local_weights_start_both_networks_and_none_takes_the_teacher_as_it_is(here):
    erpm.save(here / "ten.safetensors", erpm.build("cifar:resnet8-s2", 10))
    out = runs("distill", *TINY, "robustify.method=none", "model.student_weights=ten.safetensors",
               "model.teacher_weights=ten.safetensors")
    ten, s = erpm.load("ten.safetensors"), erpm.load("runs/shapes")
    assert equal(erpm.load("runs/shapes/teacher.safetensors"), ten)
    assert torch.equal(s.original(s.backbone(images(3))), ten(images(3)))
    assert "has no classifier" not in out


def tuned(run, *words):
    (run / "model.safetensors").unlink()
    runs("distill", "--recipe", "demo", *DEMO, "distill.epochs=0.3", *words)
    return erpm.load(run)


@pytest.mark.parametrize("method, first", [("apt", 2), ("lp", 6), ("ft", 0), ("lp-ft", 0)])
def test_baselines_train_their_part_alone(run_of_demo, method, first):
    net = tuned(run_of_demo, f"distill.method={method}")
    before = erpm.load(run_of_demo / "student.safetensors")
    moved_ = [not equal(a, b) for a, b in zip(net.net, before.net)]
    assert moved_ == [k >= first and bool(list(m.parameters())) for k, m in enumerate(net.net)]
    assert net.card.label == method.upper() and net.card.train["images"] > 0


def test_wise_ends_at_the_original_and_at_ft_exactly(run_of_demo):
    for alpha, same in ((0, "student"), (1, "ft")):
        wise = tuned(run_of_demo, "distill.method=wise", f"distill.wise={alpha}")
        assert equal(wise, erpm.load(run_of_demo / f"{same}.safetensors"))
    with refuses("the original has other tensors"):
        erpm.tune_wise(None, None, tiny_net(5), tiny_net(6))


def test_a_team_is_the_original_a_tail_of_its_own_and_the_teacher(run_of_demo):
    both, original, teacher = (erpm.load(run_of_demo / f"{name}.safetensors")
                               for name in ("team", "student", "teacher"))
    x = images(4)
    clean, robust = (tail(both.net(x)) for tail in both.tails)
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
    for other in (none, some):
        missing, unexpected = other.load_state_dict(net.state_dict(), strict=False)
        assert all(k.endswith("prompt") for k in missing) and not unexpected
    assert torch.equal(none(x), net(x)) and not torch.allclose(some(x), net(x), atol=1e-5)
    assert torch.equal(erpm.stages(some)(x), some(x))
    n = sum(k.endswith("prompt") for k in some.state_dict())
    assert n == (len(erpm.stages(some)) - 3 if deep else 1)


def test_vpt_trains_prompts_and_classifier_alone(here):
    runs("distill", *TINY, "model.student=timm:test_vit", "data.size_px=32", "distill.method=vpt")
    made, before = erpm.load("runs/shapes"), erpm.load("runs/shapes/student.safetensors")
    assert {k for k, v in before.state_dict().items() if not torch.equal(v, made.state_dict()[k])} \
        == {"net.head.weight", "net.head.bias"}


def test_gflops_are_those_of_the_shapes():
    net, student = erpm.Net(tiny_net(width=64)), erpm.Student(tiny_net(width=64), 2, 1)
    want = 2 * (9 * 3 * 64 * 16 ** 2 + 9 * 64 * 64 * (8 ** 2 + 4 ** 2) + 64 * 5) / 1e9
    assert gflops(net, 32) == pytest.approx(want, abs=1e-6)
    assert gflops(erpm.Team(net, net), 32) == pytest.approx(2 * want, abs=2e-6)
    assert want < gflops(student, 32) < gflops(student, 32, 9)
    vit = erpm.build("timm:test_vit", 5, "random")
    assert gflops(vit, 160) < gflops(erpm.prompted(vit), 160)
    assert gflops(erpm.build("open_clip:tiny", ["owl", "cat"]), 32) > 0


def test_compare_makes_every_row_of_every_seed_once_and_prints_its_tables(here):
    out = runs("compare", "run=c", *TINY, "eval.sets=shapes", "compare.seeds=2", "compare.rows="
               "# Methods; as known\nERPM:\n# Teachers\nOther: robustify.augment=augmix\n"
               "KD: robustify.method=kd distill.method=none")
    files = {"student", "teacher", "teacher-augment-augmix", "model", "erpm-augment-augmix",
             "teacher-method-kd"}
    for run in (here / "runs/c", here / "runs/c-s1"):
        assert {p.stem for p in run.glob("*.safetensors")} == files
        assert erpm.resolve(file=run / "config.yaml").distill.method == "erpm"
        assert {"Other", "ERPM + teacher"} <= {r["label"] for r in result_rows(run)}
        [nets] = erpm.networks(erpm.resolve(file=run / "config.yaml"))
        for label, file in (("ERPM", "teacher"), ("Other", "teacher-augment-augmix")):
            assert equal(nets[f"{label} + teacher"].teacher, erpm.load(run / f"{file}.safetensors"))
    table = out.split("## Teachers")[1].split("##")[0]
    assert "| Other" in table and "| ERPM" not in table and " ± " in table and "| KD " in table
    assert "| original + teacher" in table
    assert "as known" in out and "figures left out: matplotlib" in out
    assert "KD + teacher" not in out                           # a small network is no team's clean


def test_compare_makes_last_what_is_made_of_other_rows(here, monkeypatch):
    made = []
    monkeypatch.setattr(erpm, "network", lambda own, images, role, words, label: made.append(label))
    for name in ("run_eval", "run_report"):
        monkeypatch.setattr(erpm, name, Mock())
    runs("compare", *TINY, "compare.rows=W: distill.method=wise\nFT: distill.method=ft")
    assert made == ["FT", "W"]


def test_sigkill_in_the_middle_of_an_epoch_changes_no_bit(demo, run_of_demo, capsys):
    words, keep = ["distill", "--recipe", "demo", *DEMO], erpm.keep
    (run_of_demo / "model.safetensors").unlink()

    def work():
        erpm.keep = lambda *a: keep(*a) or os.kill(os.getpid(), signal.SIGKILL)
        return erpm.main(words)
    job = forked(work)
    job.join(100)
    assert job.exitcode == -signal.SIGKILL and not (run_of_demo / "model.safetensors").exists()
    assert "half-done job with other settings (distill.lr: 0.002 -> 0.5)" in fails(
        capsys, *words, "distill.lr=0.5")
    assert "goes on at step 3" in runs(*words)
    assert equal(erpm.load(run_of_demo), erpm.load(demo[0] / "runs/demo"))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_group_stops_cleanly_with_its_own_exit_code(here, number, code):
    make_tree(here / "set", n=40)

    def work():
        sys.stderr = open("err", "w", buffering=1)
        return erpm.main(["pretrain", *TINY, "run=x", "data.name=folder:set", "data.size_px=32",
                          "data.workers=2", "pretrain.epochs=400"])
    job, log = forked(work), here / "runs/x/log.jsonl"
    while job.is_alive() and not (log.is_file() and log.read_text()):
        time.sleep(0.01)
    os.killpg(job.pid, number)
    job.join(60)
    assert job.exitcode == code and Path("runs/x/student.ckpt").is_file()
    assert re.fullmatch(r"erpm.py: .*goes on from here\n", Path("err").read_text())


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


def test_bench_pairs_the_same_work(monkeypatch):
    calls = []
    row = erpm.paired(lambda: calls.append("a"), lambda: calls.append("b"), 10, 10, 3)
    assert calls == ["a", "b"] * 4 and row["spread"][0] <= row["ratio"] <= row["spread"][1]
    monkeypatch.setattr(erpm, "frost_folder", lambda: None)
    package = Mock(corrupt=lambda x, severity, name: calls.append(name))
    monkeypatch.setitem(sys.modules, "imagecorruptions", package)
    rows = list(erpm.bench_images(size=32, n=2))
    assert [r["part"] for r in rows][-3:] == ["the 15", "the 14 without glass_blur", "augmix"]
    assert {*calls} == {"a", "b", *erpm.CORRUPTIONS} and all(len(r) == 6 for r in rows)


def test_bench_runs(here, monkeypatch):
    """Of small networks and images, once each side."""
    shapes, net = erpm.make_shapes, erpm.Net(tiny_net())

    def once(ours, theirs, n, m):
        ours(), theirs()
        return {"ours": n, "theirs": m}
    monkeypatch.setattr(erpm, "paired", once)
    monkeypatch.setattr(erpm, "make_shapes", lambda n, size, split: shapes(n, 32, split))
    monkeypatch.setattr(erpm, "named", lambda *a: copy.deepcopy(net))
    assert "10 in the tail, ViT-S/16, batch 8" in runs("bench", "eval")
    rows = [json.loads(line) for line in open("runs/shapes/bench.jsonl")]
    assert [r["bench"] for r in rows] == ["eval"] * 13
    rows += [*itertools.islice(erpm.bench_train(), 17), *erpm.bench_loader(n=4)]
    assert all(r["ours"] > 0 and r["theirs"] > 0 for r in rows)
    assert rows[-2]["part"] == "ERPM, ViT-S/16"          # both batches of the first one are done


# ==== nothing lost, nothing silently wrong ====

def checkpoint_of(run):
    net = erpm.Net(tiny_net())
    return erpm.resume(run / "t.ckpt", {"model": net}, {})[0], erpm.weights_sha(net)


READ = {"t.ckpt": checkpoint_of, "results.jsonl": erpm.read_rows,
        "config.yaml": lambda run: erpm.resolve(file=run / "config.yaml"),
        "model.safetensors": lambda run: erpm.weights_sha(erpm.load(run)),
        "view.safetensors": lambda run: erpm.sha(erpm.read_weights(run / "view.safetensors")[0]),
        "sample.png": lambda run: erpm.sha(erpm.read_picture(run / "sample.png").tobytes())}


@pytest.mark.parametrize("file", READ)
def test_no_flipped_bit_and_no_cut_is_taken_for_the_file(run_of_demo, file):
    run, random = run_of_demo, np.random.default_rng(0)
    for step in (3, 6):
        erpm.keep(run / "t.ckpt", {"model": erpm.Net(tiny_net())}, {}, step, 1.0, 0)
    erpm.write_tensors(run / "view.safetensors", {"0": torch.rand(9, 9)}, erpm.Card())
    to_pil(images(1)[0]).save(run / "sample.png")
    rows = (run / "results.jsonl").read_text().splitlines(keepends=True)
    (run / "results.jsonl").write_text("".join(rows[:5]))
    whole, want = (run / file).read_bytes(), READ[file](run)
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
            same = got == want and (k % 2 or file == "sample.png")       # cut behind its pixels
            assert older or fewer or same, (k, got)


def test_a_damaged_row_is_computed_again(run_of_demo):
    file, kept = run_of_demo / "results.jsonl", ("of", "rules", "correct", "n")
    before = {str([r.get(k) for k in kept]) for r in result_rows(run_of_demo)}
    file.write_text("{\n" + file.read_text().replace('"n": 30', '"n": 31', 1))
    out = runs("eval", "--run", run_of_demo, "--set", "shapes")
    assert "row 1 is damaged: eval makes it again" in out and "row 2 is damaged" in out
    assert {str([r.get(k) for k in kept]) for r in erpm.read_rows(run_of_demo)} == before


def test_16_bit_pictures_are_scaled_and_others_without_a_range_refused(tmp_path):
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for file, kind in (("a.png", np.uint16), ("b.tiff", np.int32)):
        Image.fromarray(grey.astype(kind)).save(tmp_path / file)
        got = np.asarray(erpm.read_picture(tmp_path / file))
        assert np.abs(got[..., 0] - grey / 257.0).max() <= 0.51 and got.shape == (8, 8, 3)
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "c.tiff")
    with refuses("has no known range"):
        erpm.read_picture(tmp_path / "c.tiff")


def test_training_sees_jpegs_as_pillow_does_and_no_spoilt_one(tmp_path, monkeypatch):
    paths = [tmp_path / f"{mode}.jpg" for mode in ("RGB", "L", "CMYK")]
    for path in paths:
        to_pil(pictures(1, 90, 70)[0]).convert(path.stem).save(path, quality=90)
    data = erpm.ImageSet("x", [0] * 3, "a", erpm.View(32), paths).training(1, flip=False)
    for k, x in enumerate(data.__getitems__([(0, k) for k in range(3)])[0]):
        with erpm.seeded(1, "crop", 0, k):
            want = erpm.v2.RandomResizedCrop(32)(erpm.read_picture(paths[k]))
        assert np.abs(x.permute(1, 2, 0).numpy() - np.asarray(want, float)).mean() < 1
    whole = paths[0].read_bytes()
    paths[0].write_bytes(whole[:2] + b"\xff" + whole[2:])                # a legal byte more
    monkeypatch.setattr(erpm, "read_picture", None)                      # by torchvision alone
    data.__getitems__([(0, 0)])
    monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90 * 70 // 3)          # a bomb, then half a file
    for content in (whole, whole[:-99]):
        paths[0].write_bytes(content)
        with refuses("cannot read the image"):
            data.__getitems__([(0, 0)])
        monkeypatch.undo()


def test_a_tree_is_walked_to_its_end_and_only_regular_files_count(tmp_path):
    put_files(tmp_path, {"a/x.png": b""})
    os.mkfifo(tmp_path / "a/y.png")
    (tmp_path / "a/loop").symlink_to(tmp_path / "a")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    paths = [p for name in "ab" for p in erpm.pictures_below(tmp_path / name)]
    assert [os.path.relpath(p, tmp_path) for p in paths] == ["a/x.png", "b/x.png"]


def test_a_long_list_of_files_is_kept_until_a_folder_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    make_tree(tmp_path / "set")
    listed = functools.partial(erpm.pictures_below, tmp_path / "set/train", long=10)
    now, walk = listed(), Mock(side_effect=erpm._walk)   # of a folder that has just been filled
    assert not (tmp_path / "home").exists() and len(now) == 12
    later = time.time_ns() + 10 ** 10
    monkeypatch.setattr(time, "time_ns", lambda: later)
    monkeypatch.setattr(erpm, "_walk", walk)
    assert listed() == listed() == now and walk.call_count == 3      # once, the three folders
    [file] = (tmp_path / "home/hub/erpm").iterdir()
    file.write_text(file.read_text().replace("cat", "rat"))
    assert listed() == now and walk.call_count == 6      # a damaged list is made again
    shutil.copy(now[0], tmp_path / "set/train/dog/new.jpg")
    assert listed() == sorted([*now, str(tmp_path / "set/train/dog/new.jpg")])


def test_one_command_at_a_time_with_the_same_settings_on_all_processes_works_in_a_run(here, capfd):
    with erpm.alone(erpm.Config(run="x")):
        line = fails(capfd, "pretrain", *TINY, "run=x")
    assert f"process {os.getpid()} on " in line and "is at work there" in line
    in_processes(2, "pretrain", *TINY, code=2, own=lambda rank: [f"pretrain.lr=1e-{3 + rank}"])
    assert "were started with different settings" in capfd.readouterr().err


def test_spoilt_pictures_stop_training_or_are_left_out_and_eval_lists_them_all(here, capsys):
    make_tree(here / "photos")
    words = [*TINY, "data.name=folder:photos", "data.size_px=32", "pretrain.batch=4"]
    (here / "photos/train/cat/1.png").write_bytes(b"junk")
    assert "cat/1.png" in fails(capsys, "pretrain", *words, "run=a")
    out = runs("pretrain", *words, "run=b", "data.on_bad_image=skip")
    assert "1 of 12 pictures photos/train/cat/1.png" in out and "pretrain: 11 images" in out
    for path in ("val/cat/1.png", "val/dog/3.png"):
        (here / "photos" / path).write_bytes(b"junk")
    line = fails(capsys, "eval", "--run", "runs/b", "data.workers=1")
    assert "2 pictures of folder:photos" in line and "cat/1.png, photos/val/dog/3.png" in line


# ==== the cache of frozen views ====

CACHED = [*TINY, "run=c", "data.n_train=50", "distill.views=2"]


def test_a_kept_view_is_that_of_its_batch_to_the_last_bit(here):
    cfg, data = erpm.resolve(CACHED), erpm.open_set("shapes", erpm.Data(n_train=50), "train")
    net, teacher = (erpm.freeze(erpm.build("cifar:resnet8-s2", 10)) for _ in range(2))
    backbone, tail = erpm.cut(net, 2)
    see = erpm.frozen_views(backbone, cfg.robustify, True, tail.eval(), teacher)
    kept, read = erpm.cached(cfg, data, backbone, True, tail, teacher)
    for epoch, k in ((0, 43), (1, 7), (2, 7), (5, 20)):
        x, y, index = kept.__getitems__([(epoch, 1), (epoch, k)])
        at = k // 20 * 20
        keys = [(epoch % 2, j) for j in range(at, min(at + 20, 50))]
        some, labels, places = data.training(erpm.fold(0, "distill")).__getitems__(keys)
        want = see(erpm.Batch(some, labels, erpm.rng("view", 0, keys)))
        got = read(erpm.Batch(x, y, None))
        assert all(torch.equal(a[1], b[k - at]) for a, b in zip(got, want)) and len(got) == 4
        assert (y[1], index[1]) == (labels[k - at], places[k - at])


def kept_views():
    """{file and name: tensor} of the run c."""
    return {f"{p.name} {k}": v for p in Path("runs/c").glob("views-*/*")
            for k, v in erpm.read_weights(p)[0].items()}


def test_any_number_of_processes_fill_a_cache_once_and_go_on(here, monkeypatch, capsys):
    words, model = ["distill", *CACHED, "distill.method=lp"], here / "runs/c/model.safetensors"
    runs(*words)
    whole, seen, harden = kept_views(), [], erpm.harden
    for p in [model, *sorted(here.glob("runs/c/views-*/*0.safetensors"))[::2]]:
        p.unlink()
    in_processes(2, *words)
    assert Path("runs/c/log.jsonl").read_text().count('"distill"') == 2       # one process writes
    assert erpm.load("runs/c").card.train["images"] == 20                     # what both saw
    assert equal(kept_views(), whole) and len(whole) == 2 * 3 * 2
    monkeypatch.setattr(erpm, "harden", lambda x, *a: seen.append(len(x)) or harden(x, *a))
    next(here.glob("runs/c/views-*/1-20.*")).unlink()
    for more in ([], ["distill.lr=1e-3"]):
        model.unlink()
        runs(*words, *more)
        assert equal(kept_views(), whole) and [n for n in seen if n > 1] == [20]
    model.unlink()
    monkeypatch.setattr(erpm.shutil, "disk_usage", lambda top: shutil._ntuple_diskusage(9, 9, 1))
    line = fails(capsys, *words, "distill.views=3")
    assert "no room for them in runs/c: take fewer views" in line


# ==== discrete adversarial distillation ====

SMALL_VQGAN = dict(n_embed=64, embed_dim=4, z_channels=8, ch=32, ch_mult=(1, 2), num_res_blocks=1,
                   attn_resolutions=(16,), resolution=32, groups=32)
DAD = [*TINY, "robustify.method=dad", "robustify.augment=none", "robustify.samples=true",
       "vqgan.epochs=0.5", "vqgan.batch=20"]


def drawn_vqgan():
    """A VQGAN whose tensors are functions of their names."""
    net = erpm.vqgan(SMALL_VQGAN)
    net.load_state_dict({k: torch.randn(v.shape, generator=erpm.rng(k)) * v[0].numel() ** -0.5
                         for k, v in net.state_dict().items()})
    return erpm.freeze(net)


@pytest.mark.parametrize("name, tensors, parameters, names", [
    ("vqgan_openimages_f8_16384", 299, 67_717_295, "ef9aaff6bb472ca2"),
    ("vqgan_imagenet_f16_1024", 343, 72_141_699, "a1929d2a7d6298c6")])
def test_published_vqgans_fit_by_name_and_shape(name, tensors, parameters, names):
    with torch.device("meta"):
        state = erpm.vqgan(name).state_dict()
    assert (len(state), sum(v.numel() for v in state.values())) == (tensors, parameters)
    shapes = json.dumps(sorted((k, tuple(v.shape)) for k, v in state.items()))
    assert erpm.sha(shapes) == names                       # of taming-transformers


def test_the_vqgan_gives_what_taming_transformers_gives():
    net, x = drawn_vqgan(), torch.rand(2, 3, 32, 32, generator=erpm.rng("x"))
    seen = net(x)
    assert net.nearest(net(x, free=0.0)[1]).sum() == 13475
    assert seen.mean().item() == pytest.approx(0.49644992, abs=1e-4)
    assert seen.std().item() == pytest.approx(0.36649489, abs=1e-4)
    assert seen[1, :, 7, 20].tolist() == pytest.approx([0.000165, 0.398866, 0.879935], abs=1e-4)


def test_vqgan_weights_load_strictly_from_a_nest_and_without_the_loss(tmp_path):
    net, path, file = drawn_vqgan(), tmp_path / "vq.pt", tmp_path / "model.yaml"
    torch.save({"state_dict": net.state_dict() | {"loss.disc": torch.ones(1)}}, path)
    words = {"n_embed": 64, "embed_dim": 4, "ddconfig": {**SMALL_VQGAN, "double_z": False}}
    file.write_text(json.dumps({"model": {"params": words}}))
    assert equal(erpm.vqgan(SMALL_VQGAN, path), net) and equal(erpm.vqgan(str(file), path), net)
    torch.save({k: v for k, v in net.state_dict().items() if "quant_conv" not in k}, path)
    with refuses("does not fit the VQGAN"):
        erpm.vqgan(SMALL_VQGAN, path)
    torch.save({"state_dict": net.state_dict(), "callbacks": slice(3)}, path)
    with refuses("weights_only=False)['state_dict'], 'plain.pt')"):        # what to do about it
        erpm.vqgan(SMALL_VQGAN, path)


@pytest.mark.parametrize("more", [{}, {"steps": 3}, {"start": 0.0}, {"step": 5.0}])
def test_samples_stay_in_the_ball_and_raise_the_teachers_loss(more):
    x, y, teacher = images(6), torch.arange(6) % 5, erpm.freeze(erpm.Net(tiny_net()))
    made, still = (erpm.dad_samples(x, y, teacher, nn.Identity(), erpm.rng(0), radius=0.5,
                                    **more | steps) for steps in ({}, {"steps": 0}))
    gap = (made - x / 255).flatten(1).norm(dim=1)
    assert made.min() >= 0 and made.max() <= 1 and (gap <= 0.5 + 1e-5).all() and (gap > 0.05).all()
    assert F.cross_entropy(teacher(made), y) > F.cross_entropy(teacher(still), y)


def slow_sample(x, y, teacher, vqgan, g, radius, step, start, through):
    """The algorithm of [B], word by word, for one image."""
    x0 = vqgan(x[None] / 255)[0].detach()
    on, noise = torch.rand((), generator=g) < start, torch.randn(x.shape, generator=g)
    v = (x0 + radius * noise / noise.norm()).clamp(0, 1) if on else x0.clone()
    v.requires_grad_()
    F.cross_entropy(teacher(vqgan(v[None]) if through else v[None]), y[None]).backward()
    v = v.detach() + step * v.grad / v.grad.norm()
    if (v - x0).norm() > radius:
        v = x0 + (v - x0) * radius / (v - x0).norm()
    return vqgan(v.clamp(0, 1)[None])[0]


@pytest.mark.parametrize("through", [False, True])
def test_samples_equal_a_slow_loop_image_by_image(through):
    x, y, teacher, vqgan = images(5), torch.arange(5), erpm.Net(tiny_net()), drawn_vqgan()
    options = {"radius": 0.4, "step": 0.3, "start": 0.5, "through": through}
    draws = [[erpm.rng(i) for i in range(5)] for _ in "ab"]
    slow = [slow_sample(*each, teacher, vqgan, g, **options) for *each, g in zip(x, y, draws[0])]
    fast = erpm.dad_samples(x, y, teacher, vqgan, draws[1], **options)
    close = (fast - torch.stack(slow)).abs() < 1e-3
    assert close.float().mean() > 0.99                              # a code may fall the other way


def test_the_dad_loss_is_that_of_its_equation():
    z, zt, y = torch.randn(6, 5), torch.randn(6, 5), torch.tensor([0, 4, 2])
    p, q = (zt / 4).softmax(1), (z / 4).softmax(1)
    kl = [sum(a * (a / b).log() for a, b in zip(p[i], q[i])) for i in range(6)]
    want = {"ce": sum(-z[i].log_softmax(0)[y[i]] for i in range(3)) / 3,
            "kd": 8 * sum(kl[:3]) / 3, "kd_dad": 8 * sum(kl[3:]) / 3}
    parts = erpm.dad_loss(z, zt, y)
    assert all(parts[k].item() == pytest.approx(v.item(), rel=1e-4) for k, v in want.items())
    assert set(erpm.dad_loss(z[:3], zt[:3], y)) == {"ce", "kd"}


def test_samples_of_a_step_are_functions_of_the_keys_alone(monkeypatch):
    seen, real = [], erpm.dad_samples
    monkeypatch.setattr(erpm, "dad_samples", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    x, y, teacher = images(6), torch.arange(6) % 5, erpm.freeze(erpm.Net(tiny_net()))
    step = erpm.dad_step(erpm.Robustify(augment="augmix"), teacher, drawn_vqgan(), 5)
    for width, order in ((8, [*range(6)]), (4, [5, 2, 0, 1, 3, 4])):
        batch = erpm.Batch(x[order], y[order], erpm.rng(0), [(0, 1, i) for i in order])
        loss, parts = step(erpm.Net(tiny_net(width=width)), batch)
        assert torch.isfinite(loss) and set(parts) == {"ce", "kd", "kd_dad"}
    assert torch.allclose(seen[0][order], seen[1], atol=1e-3)


def test_a_vqgan_in_training_fits_its_images_and_wakes_dead_codes():
    torch.manual_seed(0)
    net, x = erpm.vqgan("tiny_f2_256"), erpm.make_shapes(8, 16, "train")[0]
    erpm.fit(net, erpm.vqgan_step, erpm.as_images((x, [0] * 8)), erpm.Train(24, batch=8),
             erpm.Runtime(amp="none"), name="vqgan", seed=0)
    assert F.mse_loss(net(x / 255), x / 255) < 0.5 * (x / 255).var()
    assert len(net.nearest(net(x / 255, free=0.0)[1]).unique()) > 16


def test_a_vqgan_goes_on_to_the_same_weights(tmp_path):
    images = erpm.as_images((erpm.make_shapes(12, 16, "train")[0], [0] * 12)).training(0)

    def trained(stop, run):
        torch.manual_seed(0)
        net, steps = erpm.vqgan("tiny_f2_256"), itertools.count(1)

        def step(model, batch):                      # FLOPs are counted in the first step alone
            if next(steps) == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return erpm.vqgan_step(model, batch)
        erpm.fit(net, step, images, erpm.Train(2, batch=4), erpm.Runtime("none", save_every=1),
                 name="vqgan", seed=0, checkpoint=tmp_path / run / "t.ckpt", key={})
        return net
    whole = trained(0, "whole")
    for stop in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            trained(stop, f"{stop}")
        assert equal(trained(0, f"{stop}"), whole)


def test_samples_of_a_clip_teacher_are_stored_go_on_and_are_shared_by_processes(here):
    def files_of(folder):
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}
    words = ["robustify", "run=a", *DAD, "robustify.teacher=open_clip:tiny"]
    runs(*words)
    teacher, [made] = here / "runs/a/teacher.safetensors", here.glob("runs/a/samples-*")
    first, kept = files_of(made), erpm.load(teacher)
    assert len(first) == 40 and {p.partition("/")[0] for p in first} <= {*erpm.SHAPES}
    for p in [teacher, *(made / p for p in list(first)[::3])]:
        p.unlink()
    runs(*words)
    assert files_of(made) == first and equal(erpm.load(teacher), kept)
    teacher.unlink()
    shutil.rmtree(made)
    in_processes(2, *words, "robustify.batch=40")                                    # 20 each
    assert files_of(made) == first


# ==== mistakes ====

@pytest.mark.parametrize("says, call", [
    ("images: expected uint8", lambda: erpm.as_images((images(4) / 255 * 2, [0] * 4))),
    ("floats in [0, 1], and n labels", lambda: erpm.as_images((images(4), [0] * 3))),
    ("(4, 3, 32, 9) and 4", lambda: erpm.as_images((images(4)[..., :9], [0] * 4))),
    ("(3, 32, 32)", lambda: erpm.corrupt(pictures(1)[0], "fog", 1)),
    ("(1, 3, 31, 513)", lambda: erpm.corrupt(pictures(1, 31, 513), "fog", 1)),
    ("did you mean 'fog'", lambda: erpm.corrupt(pictures(1), "fogg", 1)),
    ("1, 2, 3, 4 or 5, got 2.5", lambda: erpm.corrupt(pictures(1), "fog", 2.5)),
    ("1 images but 2 indices", lambda: erpm.corrupt(pictures(1), "fog", 1, index=[1, 2])),
    ("pixmix", lambda: erpm.augment(pictures(1), "augmx", erpm.rng(0))),
    ("agumix", lambda: erpm.augment(pictures(1), "augmix", erpm.rng(0), agumix={})),
    ("uint8", lambda: erpm.augment(pictures(1) / 1, "augmix", erpm.rng(0))),
    ("no picture in none", lambda: erpm.pixmix(pictures(1), erpm.rng(0), pictures="none")),
    ("cut into stages: known are timm.Vis", lambda: erpm.Student(nn.Conv2d(3, 3, 1), 1, 0)),
    ("without a final Linear", lambda: erpm.Student(nn.Sequential(nn.Conv2d(3, 3, 1)), 1, 0)),
    ("build it with classes=N", lambda: erpm.Student(erpm.build("timm:test_vit", 0), 1, 0)),
    ("tune = 9: the network has ", lambda: erpm.Student(tiny_net(), 9, 0)),
    ("head = 2: expected 0 to tune = 1", lambda: erpm.Student(tiny_net(), 1, 2)),
    ("dropout = 1.0: expected", lambda: erpm.Student(tiny_net(), 1, 0, 1.0)),
    ("needs the labels", lambda: erpm.select(torch.rand(2, 3, 4), torch.ones(2, 2), "oracle")),
    ("needs the logits", lambda: erpm.select(torch.rand(2, 3, 4), torch.ones(2, 2), "max-logit")),
    ("for 16 of 16 images", lambda: erpm.evaluate(lambda x: x[:, 0, 0] * math.nan, shown())),
    ("loss is not finite at step 1", lambda: quick_fit(lambda m, b: (m(b.x).sum() / 0, {}))),
    (".x'", lambda: erpm.distill(student(), tiny_net(), shown(n=40), batch=20, x=1)),
    ("10 training images are fewer", lambda: erpm.robustify(tiny_net(), shown(), n_images=10)),
    ("shapes-c: name the clean set", lambda: erpm.evaluate(tiny_net(), "shapes-c")),
    ("labels 0 to 12", lambda: erpm.robustify(tiny_net(), (images(2), [0, 12]), batch=2)),
    ("networks of 5 and 7 outputs", lambda: erpm.distill(student(), tiny_net(7), shown(), batch=8)),
    ("lacks n_embed", lambda: erpm.vqgan({})),
    ("expected {model: {params", lambda: erpm.vqgan({"ddconfig": [1]})),
    ("33 px are no multiple of 2", lambda: erpm.vqgan(SMALL_VQGAN)(torch.zeros(1, 3, 33, 33)))])
def test_a_mistake_in_a_call_is_one_clear_line(says, call):
    with refuses(says):
        call()


@pytest.mark.parametrize("words, says", [
    ("distill distill.lrr=1", "'distill.lrr'; did you mean 'distill.lr'?"),
    ("distill data.crop=yes", "data.crop: expected bool, got 'yes'"),
    ("distill distill.method=ermp", "unknown distill.method 'ermp'; did you mean 'erpm'?"),
    ("distill distill.accum=7", "distill.batch: 20 images cannot be shared equally"),
    ("distill model.teacher=timm:resnet50.foo", "unknown network of timm 'resnet50.foo'"),
    ("distill distill.tune=99", "tune = 99"),
    ("distill model.student_weights=none.safetensors", "no file none.safetensors"),
    ("distill data.name=imagenet-r", "has no training split"),
    ("distill model.head=text model.student=open_clip:tiny model.templates=no",
     "No such file or directory: 'no'"),
    ("robustify robustify.method=none", "has no trained classifier for these 10 classes"),
    ("distill robustify.method=dad vqgan.name=f9", "unknown vqgan.name 'f9'"),
    ("distill robustify.method=dad vqgan.weights=none.pt", "no file none.pt"),
    ("pretrain pretrain.batch=700", "40 training images are fewer than a batch of 700"),
    ("compare 'compare.rows=A: distill.methd=lp'", "compare.rows: A: 'distill.methd'; did you"),
    ("compare 'compare.rows=A: data.flip=false\nA: data.crop=false'", "A has other settings in an"),
    ("distill distill.method=vpt", "vpt: cifar:resnet8-s2 has no tokens to add prompts to"),
    ("compare 'compare.rows=A: distill.method=lp model.head=text'", "no linear layer to train"),
    ("eval --model resnet50", "expected FAMILY:NAME"),
    ("eval --model cifar:resnet21", "expected cifar:resnetD"),
    ("eval --model run:nowhere", "no weights file nowhere"),
    ("eval --model torchvision:resnet5", "unknown network of torchvision 'resnet5'; did you mean"),
    ("eval --model torchvision:resnet50/V1", "unknown weights of torchvision:resnet50 'V1'"),
    ("eval --model open_clip:ViT-B-32-quickgelu/opnai", "did you mean 'openai'"),
    ("eval --set imagenet-rr", "unknown set 'imagenet-rr'; did you mean 'imagenet-r'?"),
    ("eval --set folder:half --model run:r", "half/val/CLASS/IMAGE"),
    ("eval --set folder:one --model run:r", "two classes or more, found 1"),
    ("eval --set folder:empty --model run:r", "pictures alone: dog"),
    ("eval --set cifar10 --model run:r", "looked for data/cifar-10-batches-py; get it: python"),
    ("eval --set folder:in --model run:r data.workers=1 eval.head=own", "remove in/dog/0.png"),
    ("eval --set folder:flat --model run:r", "its classes are not those of folder:flat, and a lin"),
    ("eval --set shapes --model run:r", "has 2 classes and shapes needs 10"),
    ("eval --run r,b", "no run r,b: it has no config.yaml"),
    ("eval eval.rule=products", "unknown rule 'products'; did you mean"),
    ("eval --set shapes", "no trained network in runs/shapes"),
    ("report", "no results in runs/shapes"), ("bench speed", "unknown bench 'speed'"),
    ("corrupt in", "takes two folders"), ("corrupt none out", "no image below none"),
    ("corrupt in in/out", "lies in")])
def test_a_mistake_on_the_command_line_is_one_line_and_code_2(words, says, here, capsys):
    put_files(here, {"in/dog/0.png": b"no picture"} | {f"{folder}/0.png": encoded(1) for folder in (
        "in/cat", "flat/cat", "flat/dog", "half/train/cat", "one/cat", "empty/cat")})
    (here / "empty/dog").mkdir()
    saved(here / "r/model.safetensors", erpm.build("cifar:resnet8-s2", 2), "folder:in")
    command, *words = shlex.split(words)
    line = fails(capsys, command, *TINY, *words)
    assert says in line and not (here / "data").exists()
    assert "robustify.method=dad" not in words or not list(here.glob("runs/*/[a-z]*"))  # at once


# ==== killing, damaging and fuzzing: ERPM_SLOW=1 ====

slow = pytest.mark.skipif(not SLOW, reason="ERPM_SLOW=1 runs it")
CHAIN = [*TINY, "run=k", "data.name=folder:photos", "data.size_px=32", "data.n_train=0",
         "robustify.method=dad", "robustify.samples=true", "robustify.batch=6", "vqgan.batch=6",
         "vqgan.epochs=1", "pretrain.batch=6", "distill.batch=6", "distill.epochs=2",
         "distill.views=2", "eval.n_cell=2", "runtime.save_every=1",
         "compare.rows=ERPM:\nLP: distill.method=lp"]


def comes_to(run):
    """What a run comes to: its weights, and its rows without times."""
    rows = sorted(str(r | {"train": 0}) for r in untimed(run))
    return rows, {p.name: erpm.weights_sha(erpm.load(p)) for p in run.glob("*.safetensors")}


@slow
@pytest.mark.parametrize("processes, workers", [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_ten_kills_at_any_moment_leave_no_trace(here, processes, workers):
    make_tree(here / "photos")
    words = ["compare", *CHAIN, f"data.workers={workers}"]
    since, random, kills = time.monotonic(), np.random.default_rng([processes, workers]), 0
    in_processes(processes, *words, "out=whole")
    whole = time.monotonic() - since
    while kills < 10:
        jobs = started(processes, *words, "out=killed")
        jobs[0].join(random.uniform(0.05, 0.4) * whole)
        kills += any(job.is_alive() for job in jobs)
        for job in jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.join()
        if not any(job.exitcode for job in jobs):   # it ended between two kills: from the start
            assert comes_to(here / "killed/k") == comes_to(here / "whole/k")
            shutil.rmtree("killed")
    in_processes(processes, *words, "out=killed")
    assert comes_to(here / "killed/k") == comes_to(here / "whole/k")


@slow
@pytest.mark.parametrize("lack", ["folder", "room", "memory"])
@pytest.mark.parametrize("k", range(10))
def test_a_machine_that_fails_is_told_in_one_line_and_loses_nothing_good(here, lack, k):
    stage, run = ("pretrain", "robustify", "distill", "eval")[k % 4], here / "runs/f"
    split, n = ("test", 12000) if stage == "eval" else ("train", 3000)
    large = [f"{stage}.batch={n}", f"data.n_{split}={n}"]

    def work():
        sys.stderr = open(os.dup2(os.open("err", os.O_CREAT | os.O_WRONLY), 2), "w", buffering=1)
        return erpm.main(["demo", *TINY, "run=f", "compare.rows=", "eval.sets=shapes",
                          *large * (lack == "memory")])
    job = forked(work)
    while not run.is_dir() and job.is_alive():
        time.sleep(0.01)
    if lack == "folder":
        time.sleep(0.3 * k)
        shutil.rmtree(run, ignore_errors=True)
    elif lack == "room":                                        # a longer file cannot be written
        resource.prlimit(job.pid, resource.RLIMIT_FSIZE, (200 * 3 ** k,) * 2)
    else:                                                       # for a batch that is too large
        pages = int(Path(f"/proc/{job.pid}/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + (128 + 16 * k << 20)
        resource.prlimit(job.pid, resource.RLIMIT_AS, (most, most))
    job.join(200)
    told = (here / "err").read_text().splitlines()
    assert (job.exitcode, len(told)) in ((2, 1), (0, 0)), told
    assert lack != "memory" or f"{stage}.batch={n}" in told[0]
    assert not list(here.rglob("*.part")) and all(map(erpm.load, run.glob("*.safetensors")))


@slow
def test_a_thousand_command_lines_end_without_a_traceback(here, capsys):
    values = ["", "0", "-1", "1e400", "nan", "true", "x", "a,b", "[", "{}", "shapes", "folder:/",
              "é" * 300, "1e-3", "10" * 20, "../x", "timm:resnet18", "none", "augmix+augmix", "kl"]
    keys = [*erpm.FIELDS, *["--recipe", "--config", "--run", "--set", "--model"] * 9]
    random, codes = np.random.default_rng(0), []
    for _ in range(1000):
        pairs = zip(random.choice(keys, random.integers(4)), random.choice(values, 3))
        try:
            args = erpm.parse([random.choice([*erpm.COMMANDS]), *map("=".join, pairs)])
            erpm.preflight(erpm.configure(args), args.command)
            codes.append(0)
        except (erpm.UserError, OSError, SystemExit) as e:
            codes.append(e.code if isinstance(e, SystemExit) else 2)
    assert set(codes) == {0, 2} and min(codes.count(0), codes.count(2)) > 100


@slow
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_spoilt_files_are_pictures_or_a_clear_error(tmp_path, kind):
    to_pil(images(1, 40)[0]).save(tmp_path / "a.png", kind)
    whole, random = (tmp_path / "a.png").read_bytes(), np.random.default_rng(0)
    for k in range(200):
        part = bytearray(whole[:random.integers(len(whole))] if k % 2 else whole)
        for at in random.integers(max(1, len(part)), size=1 + k % 5):
            part[at:at + 1] = bytes([random.integers(256)])
        (tmp_path / "a.png").write_bytes(part)
        with contextlib.suppress(erpm.UserError):
            assert erpm.read_picture(tmp_path / "a.png").mode == "RGB"
