"""Tests of erpm.py: CPU, no network, tiny synthetic data.  A test's name is the law it checks."""
import ast
import contextlib
import io
import json
import math
import os
import re
import shutil
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

import erpm

HERE = Path(__file__).parent
SOURCE = (HERE / "erpm.py").read_text()
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
TINY = """\
model.student=cifar:resnet8-s2 model.teacher=cifar:resnet8-s2 distill.tune=2 distill.head=1
data.n_test=60 data.n_train=600 pretrain.n_images=0 robustify.n_images=0 distill.n_images=0
pretrain.batch=50 pretrain.epochs=2 robustify.batch=50 robustify.epochs=1 distill.batch=50
distill.epochs=2 eval.batch=32 eval.passes=3 runtime.log_every=2 runtime.save_every=3""".split()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def command(*words, cwd, launcher=(), **kw):
    """Runs erpm.py as a user does; launcher: words between the interpreter and the file."""
    return subprocess.run([sys.executable, *launcher, str(HERE / "erpm.py"), *map(str, words)],
                          cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300, **kw)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def fork_all(n, work):
    """Calls work(rank) in n processes; they start much faster than torchrun's."""
    fork = torch.multiprocessing.get_context("fork")
    workers = [fork.Process(target=work, args=(rank,), daemon=True) for rank in range(n)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(200)
    assert [w.exitcode for w in workers] == [0] * n


def in_processes(n, cwd, *words):
    """Runs a command as torchrun does on n processes."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])

    def work(rank):
        os.chdir(cwd)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n),
                       "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os._exit(erpm.main([str(w) for w in words]))
    fork_all(n, work)


def tiny_net(classes=5, width=8):
    torch.manual_seed(0)
    block = lambda i, o: nn.Sequential(                                        # noqa
        nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())
    net = nn.Sequential(block(3, width), block(width, width), block(width, width),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    return net.eval()


def images(n=16, size=32, seed=0):
    return torch.randint(0, 256, (n, 3, size, size),
                         generator=erpm.rng("test", seed)).to(torch.uint8)


def result_rows(run):
    return [json.loads(line) for line in (Path(run) / "results.jsonl").read_text().splitlines()]


def counts(run):
    keep = ("label", "weights", "set", "corruption", "severity", "n", "correct", "rules", "sigma",
            "kl")
    return [{k: r.get(k) for k in keep} for r in result_rows(run)]


# ==== the file itself ====

TREE = ast.parse(SOURCE)
TOP = {n.name: n for n in TREE.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def test_sections_are_those_of_the_docstring():
    banners = re.findall(r"^# ==== (\d+\. [A-Z]+) ====$", SOURCE, re.M)
    listed = re.findall(r"^    (\d+\. [A-Z]+)$", ast.get_docstring(TREE, clean=False), re.M)
    assert banners == listed and len(banners) == 12


def test_nothing_is_used_before_it_is_defined():
    for name, node in TOP.items():
        hints = {id(x) for n in ast.walk(node)
                 for a in (getattr(n, "annotation", None), getattr(n, "returns", None))
                 if a for x in ast.walk(a)}
        names = [x for x in ast.walk(node) if isinstance(x, ast.Name) and id(x) not in hints]
        local = {x.id for x in names if isinstance(x.ctx, ast.Store)} | {
            a.arg for a in ast.walk(node) if isinstance(a, ast.arg)}
        later = {x.id for x in names if x.id in TOP and TOP[x.id].lineno > node.end_lineno} - local
        assert not later, f"{name} uses {later} that stand below"


def test_no_function_is_long_and_no_line_is_wide():
    functions = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef)]
    assert max(n.end_lineno - n.lineno + 1 for n in functions) <= 80
    assert max(len(line) for line in (SOURCE + Path(__file__).read_text()).splitlines()) <= 100


def test_every_public_name_has_a_docstring():
    assert [n for n, node in TOP.items()
            if not n.startswith("_") and not ast.get_docstring(node)] == []


def test_import_has_no_side_effect_and_loads_no_slow_package(tmp_path):
    code = ("import torch, os, sys; "
            "before = torch.random.get_rng_state(), dict(os.environ), os.listdir()\n"
            f"sys.path.insert(0, {str(HERE)!r}); sys.argv = ['x', '--bad']; import erpm\n"
            "assert torch.equal(before[0], torch.random.get_rng_state())\n"
            "assert before[1:] == (dict(os.environ), os.listdir())\n"
            "assert not {'timm', 'open_clip', 'matplotlib'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_recipe_of_config_yaml_loads():
    recipes = erpm.read_yaml(HERE / "config.yaml")
    assert {"demo", "imagenet-rn101", "imagenet-clip-l14"} <= set(recipes)
    for name in recipes:
        assert erpm.resolve(name, []).run == name


def test_every_command_of_the_readme_parses():
    lines = re.findall(r"^ *(?:torchrun.* |python )erpm\.py (.*?)(?:  +#.*)?$",
                       (HERE / "README.md").read_text(), re.M)
    assert len(lines) >= 8
    for line in lines:
        args = erpm.parse(shlex.split(line))
        erpm.resolve(args.recipe, [w.replace("...", "x") for w in args.words])


# ==== basics and config ====

def test_seeds_are_functions_of_the_key():
    assert erpm.fold(1, "a") == erpm.fold(1, "a") != erpm.fold(1, "b")
    u = erpm.uniforms(3, np.arange(5000), 4)
    assert np.array_equal(u[7:9], erpm.uniforms(3, np.array([7, 8]), 4))
    assert (0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.01
            and abs(u.std() - 12 ** -0.5) < 0.01)


def test_precedence_is_default_recipe_words():
    cfg = erpm.resolve("demo", ["distill.lr=0.5", "seed=3"])
    assert (cfg.distill.lr, cfg.seed, cfg.run) == (0.5, 3, "demo-s3")
    assert erpm.resolve("demo", ["data.name=cifar10"]).run == "demo-cifar10"


@pytest.mark.parametrize("words, says", [
    (["distill.lrr=1"], "unknown key 'distill.lrr'; did you mean 'lr'?"),
    (["distill.lr=fast"], "command line: distill.lr: expected float, got 'fast'"),
    (["distill=3"], "distill is a section, got '3'"),
    (["seed=1.5"], "seed: expected int, got '1.5'"),
    (["distill.dropout=1"], "distill.dropout: expected a value from 0 to 1"),
    (["distill.head=9"], "distill.head: expected 0 to distill.tune"),
    (["distill.method=ermp"], "unknown distill.method 'ermp'; did you mean 'erpm'?"),
    (["nonsense"], "'nonsense' is not of the form key=value"),
    (["distill.batch=0"], "distill.batch: expected a value above 0"),
])
def test_a_bad_word_is_one_clear_line(words, says):
    with pytest.raises(erpm.UserError, match=re.escape(says)) as e:
        erpm.resolve("demo", words)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text, says", [
    ("demo: {seed: 1}\ndemo: {seed: 2}", "the key 'demo' stands twice"),
    ("demo: {run: no}", "demo: run: expected str, got False (quote it"),
    ("demo: {seeds: 1}", "unknown key 'seeds'; did you mean 'seed'?"),
    ("demo: {distill: {lr: 1e-3, batch: 2.5}}", "distill.batch: expected int, got 2.5"),
    ("demo: [", "not valid YAML"),
])
def test_yaml_traps_are_errors(tmp_path, text, says):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(erpm.UserError, match=re.escape(says)):
        erpm.resolve("demo", [], tmp_path / "c.yaml")


def test_yaml_numbers_like_1e_3_are_floats(tmp_path):
    (tmp_path / "c.yaml").write_text("demo: {distill: {lr: 1e-3}}")
    assert erpm.resolve("demo", [], tmp_path / "c.yaml").distill.lr == 1e-3


# ==== data ====

def test_shapes_are_functions_of_the_index():
    x, y = erpm.make_shapes(200, 32, "test")
    few, _ = erpm.make_shapes(50, 32, "test")
    assert torch.equal(x[:50], few) and np.bincount(y).tolist() == [20] * 10
    assert not torch.equal(x[:50], erpm.make_shapes(50, 32, "train")[0])


@pytest.mark.parametrize("size", [32, 64])
def test_shapes_have_the_size_asked_for_and_vary(size):
    x, _ = erpm.make_shapes(20, size, "test", "r")
    assert x.shape == (20, 3, size, size) and x.float().std(0).mean() > 20


def test_samples_are_functions_of_seed_epoch_and_index():
    s = erpm.open_set("shapes", erpm.Data(n_train=300), "train").training(seed=1)
    alone = s.__getitems__([(2, 5)])[0]
    among = s.__getitems__([(2, 9), (2, 5), (2, 1)])[0][1:2]
    assert torch.equal(alone, among) and not torch.equal(alone, s.__getitems__([(3, 5)])[0])


def test_shift_and_flip_is_the_slow_obvious_one():
    x, u = images(4), np.array([[0, 0, 0], [.5, .5, .9], [.99, .2, .1], [.3, .7, .6]], np.float32)
    got = erpm.shift_and_flip(x, u)
    for i, (a, b, flip) in enumerate(u):
        padded = F.pad(x[i:i + 1].float(), (4,) * 4, mode="reflect")
        r, c = int(a * 9), int(b * 9)
        want = padded[0, :, r:r + 32, c:c + 32].to(torch.uint8)
        assert torch.equal(got[i], want if flip < 0.5 else want.flip(-1))


def test_orders_are_permutations_that_a_restart_repeats():
    def take(start, k):
        it = iter(erpm.Batches(100, 10, seed=5, start=start))
        return [next(it) for _ in range(k)]
    whole = take(0, 25)
    assert sorted(i for b in whole[:10] for _, i in b) == list(range(100))
    assert take(13, 12) == whole[13:] and [e for e, _ in whole[20]] == [2] * 10


def test_the_number_of_workers_changes_no_sample(tmp_path):
    make_tree(tmp_path)
    s = erpm.open_set(f"folder:{tmp_path}", erpm.Data(size_px=32), "train").training(seed=1)
    runs = []
    for workers in (0, 2):
        it = iter(erpm.loader(s, erpm.Batches(len(s), 4, seed=0), workers))
        runs.append(torch.cat([next(it)[0] for _ in range(4)]))
    assert torch.equal(*runs)


def make_tree(root, classes=("cat", "dog"), n=6, splits=("train", "val")):
    for split in splits:
        for k, c in enumerate(classes):
            (root / split / c).mkdir(parents=True)
            for i in range(n):
                a = images(1, 40, seed=100 * k + i)[0].permute(1, 2, 0).numpy()
                Image.fromarray(a).save(root / split / c / f"{i}.png")


def test_folder_sets_read_train_and_val(tmp_path):
    make_tree(tmp_path)
    data = erpm.Data(size_px=32)
    for split, n in (("train", 12), ("test", 12)):
        s = erpm.open_set(f"folder:{tmp_path}", data, split)
        assert (len(s), s.classes) == (n, ["cat", "dog"])
    x, y, index = s.__getitems__([(0, 0), (0, 11)])
    assert x.shape == (2, 3, 32, 32) and y.tolist() == [0, 1] and index.tolist() == [0, 11]


def test_imagenet_r_scores_its_200_classes_by_synset(tmp_path):
    names = erpm.synsets("r")
    make_tree(tmp_path / "imagenet-r", names[5:8], n=1, splits=("",))
    with pytest.raises(erpm.UserError, match="3 images in .*, expected 30,000"):
        erpm.open_set("imagenet-r", erpm.Data(root=str(tmp_path)))
    s = erpm.open_set("imagenet-r", erpm.Data(root=str(tmp_path), allow_partial=True, size_px=32))
    own = s.project.ids[:, 0]
    assert s.y.tolist() == [5, 6, 7] and [erpm.synsets()[p] for p in own] == list(names)
    z = torch.zeros(1000)
    z[own[6]], z[0 if 0 not in own else 4] = 1.0, 2.0  # a class outside the 200: louder
    assert erpm.evaluate(lambda x: z.expand(len(x), -1), s)["correct"] == 1


def test_a_projection_takes_the_largest_of_each_classs_outputs():
    project, z = erpm.Project([4, [0, 3], [2]]), torch.randn(6, 3, 5, generator=erpm.rng("z"))
    for a, b in zip(z.flatten(0, 1), project(z).flatten(0, 1)):
        assert b.tolist() == [float(a[4]), float(max(a[0], a[3])), float(a[2])]
    assert torch.equal(z.gather(-1, project.winners(z)), project(z))
    student = erpm.Student(tiny_net(), 1, 1, 0.1, dropout_in="head")   # closed form: same numbers
    f = student.features(images(8, 32) / 255)
    grouped, plain = student.moments(f, 0, project), student.moments(f, 0)
    assert torch.allclose(grouped[0], project(plain[2]).softmax(-1))
    drawn = student.moments(f, 3000, project)[1]
    assert torch.allclose(grouped[1], drawn, rtol=0.12)


def test_imagenet_v2_takes_the_label_from_the_folder_number(tmp_path):
    make_tree(tmp_path / "imagenetv2-matched-frequency-format-val", ("0", "10", "2"), n=1,
              splits=("",))
    s = erpm.open_set("imagenet-v2", erpm.Data(root=str(tmp_path), allow_partial=True))
    assert sorted(s.y.tolist()) == [0, 2, 10]


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
    "speckle_noise": ((21.40, 21.87, 151), (19.01, 28.07, 149), (14.40, 46.31, 144),
                      (12.51, 57.32, 141), (10.62, 70.97, 136)),
    "gaussian_blur": ((31.33, 4.25, 155), (27.06, 3.76, 155), (24.36, 3.25, 155),
                      (22.30, 2.78, 155), (19.56, 2.05, 155)),
    "spatter": ((34.75, 4.98, 156), (25.65, 6.17, 159), (23.47, 7.55, 161), (15.54, 10.71, 143),
                (13.37, 12.94, 136)),
    "saturate": ((23.74, 4.74, 165), (21.52, 4.74, 168), (20.53, 4.73, 141), (12.07, 4.46, 114),
                 (10.54, 4.42, 104)),
}


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
    scatter = ("frost", "fog", "elastic_transform", "spatter")
    n = 1 if name in erpm.FIXED else 64 if name in scatter else 12
    x = picture()[None]
    near, bias = (0.1, 0.6) if n == 1 else (0.6, 1) if n == 12 else (0.6, 10)
    for severity, (psnr, step, mean) in enumerate(REFERENCE[name], 1):
        got = measure(x, erpm.corrupt(x.expand(n, -1, -1, -1).contiguous(), name, severity))
        assert abs(got[0] - psnr) < near and abs(got[2] - mean) < bias, (severity, got)
        assert abs(got[1] / step - 1) < (0.02 if n == 1 else 0.1), (severity, got)


@pytest.mark.parametrize("name", erpm.CORRUPTIONS)
def test_an_image_does_not_depend_on_its_batch(name):
    for h, w in ((32, 32), (40, 33), (64, 80)):
        x = photos(90, h, w)
        whole = erpm.corrupt(x, name, 3)
        assert torch.equal(whole, erpm.corrupt(x, name, 3)) and whole.shape == x.shape
        some = [88, 5, 41]
        assert torch.equal(whole[some], erpm.corrupt(x[some], name, 3, index=some))
        assert torch.equal(whole[88:89], erpm.corrupt(x[88:89], name, 3, index=[88]))


@pytest.mark.parametrize("name", erpm.CORRUPTIONS)
def test_large_images_do_not_depend_on_their_batch_either(name):
    x = photos(3, 224, 200)
    assert torch.equal(erpm.corrupt(x, name, 5)[2:], erpm.corrupt(x[2:], name, 5, index=[2]))
    lying = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(erpm.corrupt(x, name, 5), erpm.corrupt(lying, name, 5))


@pytest.mark.parametrize("name", erpm.RANDOM)
def test_seed_index_and_severity_change_the_draw(name):
    x = photos(1, 64, 64).expand(3, -1, -1, -1)
    a = erpm.corrupt(x, name, 3)
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a, erpm.corrupt(x, name, 3, seed=1))
    b, c = (erpm.corrupt(x[:1], name, 3, seed=s) for s in (7, np.int64(7)))
    assert torch.equal(b, c)


@pytest.mark.parametrize("side", (32, 64, 224))
def test_error_grows_with_severity(side):
    x = photos(24 if side < 200 else 6, side, side)
    for name in ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "defocus_blur",
                 "gaussian_blur", "zoom_blur", "brightness", "contrast", "jpeg_compression"):
        error = [measure(x, erpm.corrupt(x, name, s))[0] for s in range(1, 6)]
        assert all(a > b - 0.15 for a, b in zip(error, error[1:])) and error[0] > error[4], name


def test_constants_go_by_the_longer_side():
    sizes = (32, 32), (48, 40), (49, 32), (128, 99), (129, 40)
    assert [erpm.scale_of(*s) for s in sizes] == [2, 2, 1, 1, 0]
    assert all(len(c) == 3 and all(len(s) == 5 for s in c) for c in erpm.CONSTANTS.values())
    assert len(erpm.CORRUPTIONS) == 19
    assert set(erpm.CORRUPTIONS) == set(erpm.FIXED) | set(erpm.RANDOM)


@pytest.mark.parametrize("size", ((32, 512), (512, 300), (225, 299)))
def test_every_size_works(size):
    x = photos(1, *size)
    for name in erpm.CORRUPTIONS:
        assert erpm.corrupt(x, name, 2).shape == x.shape
    assert erpm.corrupt(x[:0], "fog", 1).shape == (0, 3, *size)


@pytest.mark.parametrize("x, name, severity, index, words", [
    (torch.rand(1, 3, 32, 32), "fog", 1, None, "uint8.*float32"),
    (np.zeros((1, 3, 32, 32), np.uint8), "fog", 1, None, "tensor.*ndarray"),
    (torch.zeros(3, 32, 32, dtype=torch.uint8), "fog", 1, None, r"\(B,3,H,W\).*\(3, 32, 32\)"),
    (torch.zeros(1, 3, 31, 32, dtype=torch.uint8), "fog", 1, None, r"32 to 512.*\(31, 32\)"),
    (torch.zeros(1, 3, 32, 513, dtype=torch.uint8), "fog", 1, None, "32 to 512"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "fogg", 1, None, "did you mean 'fog'.*saturate"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "fog", 0, None, "1, 2, 3, 4 or 5, got 0"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "fog", 2.5, None, "got 2.5"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "fog", 1, [1, 2], "1 images but 2 indices")])
def test_bad_input_is_one_clear_error(x, name, severity, index, words):
    with pytest.raises(erpm.UserError, match=words):
        erpm.corrupt(x, name, severity, index=index)


def test_jpeg_and_the_published_round_trip_equal_pillow():
    x = photos(2, 224, 224)
    for quality, ours in ((15, erpm.corrupt(x, "jpeg_compression", 3)),
                          (85, erpm.corrupt(x, "contrast", 1, jpeg=True))):
        for a, b in zip(x if quality == 15 else erpm.corrupt(x, "contrast", 1), ours):
            file = io.BytesIO()
            Image.fromarray(a.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
            assert np.array_equal(np.asarray(Image.open(file)), b.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("size", ((32, 32), (64, 64), (224, 224), (200, 301)))
def test_pixelate_equals_pillow(size):
    x = photos(1, *size)
    h, w = size
    for severity in range(1, 6):
        c = erpm.CONSTANTS["pixelate"][erpm.scale_of(h, w)][severity - 1]
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


def test_brightness_and_saturate_are_hsv():
    import colorsys
    x = photos(1, 32, 32)
    x[..., :4] = x[:, :1, :, :4]  # greys
    x[..., 0] = 0
    for name, change in (("brightness", lambda h, s, v: (h, s, min(v + 0.15, 1))),
                         ("saturate", lambda h, s, v: (h, min(s * (1.5, 2)[1] + 0.1, 1), v))):
        ours = erpm.corrupt(x, name, 3 if name == "brightness" else 4)[0].flatten(1).T.tolist()
        for a, b in zip(x[0].flatten(1).T.tolist(), ours):
            want = colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*(i / 255 for i in a))))
            assert all(-1.01 < j - 255 * i < 0.01 for i, j in zip(want, b)), (a, b, want)


def test_shot_noise_is_poisson():
    x = torch.full((1, 3, 224, 224), 100, dtype=torch.uint8)
    for severity, c in enumerate(erpm.CONSTANTS["shot_noise"][0], 1):
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
    x = photos(2, 64, 50)
    shift = torch.zeros(2, 3, 2)
    eye = erpm.affine(64, 50, shift)
    assert torch.allclose(eye, torch.eye(2, 3).expand(2, 2, 3), atol=1e-6)
    moved = erpm.affine(64, 50, shift + torch.tensor([3.0, 0]))  # all points 3 px to the right
    assert torch.allclose(moved[:, 0, 2], torch.tensor(-3 * 2 / 49.0), atol=1e-6)
    still = erpm.elastic_transform(x, (0, 0, 0), [erpm.rng(0), erpm.rng(1)])
    assert (still.int() - x.int()).abs().max() <= 1


def test_distance_is_the_nearest_pixel():
    mask = torch.rand(1, 1, 40, 30, generator=erpm.rng("d")) < 0.003
    points = mask[0, 0].nonzero().double()
    grid = torch.cartesian_prod(torch.arange(40), torch.arange(30)).double()
    want = torch.cdist(grid, points).min(1).values.view(40, 30).clamp(max=20)
    assert torch.allclose(erpm.distance(mask)[0, 0].double(), want, atol=1e-4)


def test_flat_images_keep_their_value_under_blur():
    x = torch.full((1, 3, 224, 224), 255, dtype=torch.uint8)
    for name in ("gaussian_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform"):
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
NAMES = [*erpm.AUGMENTATIONS, "pixmix+augmix", "deepaugment+augmix", "augmix+mixup"]


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
def test_each_operation_equals_pil(op, h, w):
    x, random = pictures(8, h, w), np.random.default_rng(0)
    level = random.uniform(0.1, 9.9, 8)
    if op in erpm.GEOMETRIC_OPS:
        level *= random.choice([-1, 1], 8)
    images = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in x]
    theirs = [np.asarray(PIL_OPS[op.__name__](i, v)) for i, v in zip(images, level.tolist())]
    gap = np.abs(op(x, level).permute(0, 2, 3, 1).numpy().astype(int) - np.stack(theirs))
    interpolates = op.__name__ in INTERPOLATING  # float32 against PIL's float64, then truncation
    assert gap.max() <= interpolates and (gap > 0).mean() <= 0.002 * interpolates


@pytest.mark.parametrize("spec", NAMES)
def test_output_is_a_function_of_the_generator(spec):
    x, state = pictures(5), torch.get_rng_state()
    before = x.clone()
    a, b, c = (erpm.augment(x, spec, erpm.rng("same", k)) for k in (0, 0, 1))
    assert a.dtype == torch.uint8 and a.shape == x.shape and torch.equal(a, b)
    assert spec in ("none", "clean") or not torch.equal(a, c)
    assert torch.equal(x, before), "the input was changed"
    assert torch.equal(torch.get_rng_state(), state), "the global generator moved"


@pytest.mark.parametrize("spec", [n for n in erpm.AUGMENTATIONS if n not in ("none", "clean")])
def test_each_image_is_drawn_for_itself(spec):
    x = pictures(1).expand(16, -1, -1, -1)
    assert len(erpm.augment(x, spec, erpm.rng(0)).flatten(1).unique(dim=0)) > 8


@pytest.mark.parametrize("spec", NAMES)
@pytest.mark.parametrize("shape", [(1, 32, 32), (0, 32, 32), (3, 17, 29)])
def test_any_batch_and_shape_work(spec, shape):
    x = pictures(4, *shape[1:])[: shape[0]]
    assert erpm.augment(x, spec, erpm.rng(0)).shape == x.shape


def test_augmix_does_not_depend_on_the_chunks(monkeypatch):
    x = pictures(9)
    whole = erpm.augmix(x, erpm.rng(0), severity=3)
    pairs = [slice(i, i + 2) for i in range(0, 9, 2)]
    monkeypatch.setattr(erpm, "_chunks", lambda x, size=0: pairs)
    assert torch.equal(erpm.augmix(x, erpm.rng(0), severity=3), whole)


# severity: mean |augmix(x) - x| of google-research/augmix on pictures(4), 8,000 draws; its error
ORIGINAL = {1: (8.928, 0.115), 3: (15.786, 0.159)}


@pytest.mark.parametrize("severity", ORIGINAL)
def test_augmix_deviates_as_much_as_the_original(severity):
    x = pictures(4).repeat(500, 1, 1, 1)
    mixed = erpm.augmix(x, erpm.rng("deviation"), severity=severity)
    gap = (mixed.float() - x).abs().mean((1, 2, 3))
    mean, error = ORIGINAL[severity]
    assert abs(gap.mean() - mean) < 4 * (error**2 + gap.var() / len(gap)) ** 0.5


def test_augmix_of_zero_weight_is_the_image(monkeypatch):
    monkeypatch.setattr(erpm, "_beta", lambda generator, a, b, *shape: np.zeros(shape))
    x = pictures(8)
    assert torch.equal(erpm.augmix(x, erpm.rng(0), severity=10), x)


def test_jsd_equals_the_formula():
    z = [torch.randn(6, 5, generator=erpm.rng("logits", i)) * 3 for i in range(3)]
    p = [np.exp(v.double().numpy()) for v in z]
    p = [v / v.sum(1, keepdims=True) for v in p]
    mean = sum(p) / 3
    expected = sum((q * np.log(q / mean)).sum(1).mean() for q in p) / 3
    assert abs(erpm.jsd(*z).item() - expected) < 1e-6
    assert erpm.jsd(*(v.bfloat16() for v in z)).dtype == torch.float32
    assert erpm.jsd(z[0], z[0], z[0]) < 1e-6


def test_a_sum_is_a_sequence_in_a_fixed_order():
    x, g = pictures(6), erpm.rng("sum")
    expected = erpm.augmix(erpm.pixmix(x, g), g)
    for spec in ("pixmix+augmix", "augmix+pixmix"):
        assert torch.equal(erpm.augment(x, spec, erpm.rng("sum")), expected)


def test_options_reach_their_augmentation():
    x = pictures(6)
    ours = erpm.augment(x, "augmix", erpm.rng(0), augmix={"severity": 3})
    assert torch.equal(ours, erpm.augmix(x, erpm.rng(0), severity=3))


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
    mixed = erpm.pixmix(x, erpm.rng(0), pictures=str(tmp_path)).float().mean((0, 2, 3))
    assert mixed[0] > mixed[1] + 3 and torch.allclose(mixed[1], mixed[2], atol=1e-3)


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
    area = (erpm.augment(x, "cutout", erpm.rng(0)) == 128).float().sum((2, 3))
    assert area.max() == 256 and area.min() >= 64 and area.unique().numel() > 5


@pytest.mark.parametrize("spec", ["mixup", "cutmix", "mixup+cutmix", "augmix+cutmix"])
def test_soft_labels_are_the_shares_of_the_pixels(spec):
    y, state = torch.arange(40) % 2, torch.get_rng_state()
    x = (y * 200).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    mixed, soft = erpm.mix_labels(x, y, spec, erpm.rng(0), 5)
    share = mixed.float().mean((1, 2, 3)) / 200
    assert mixed.dtype == torch.uint8 and torch.allclose(share, soft[:, 1], atol=3e-3)
    assert torch.allclose(soft.sum(1), torch.ones(40)) and soft[:, 0].unique().numel() > 10
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_mixer_labels_become_one_hot():
    x, soft = erpm.mix_labels(pictures(3), torch.tensor([2, 0, 1]), "augmix", erpm.rng(0), 4)
    assert torch.equal(x, pictures(3)) and soft.argmax(1).tolist() == [2, 0, 1]


# ==== models ====

def test_stages_of_a_sequential_equal_it_and_keep_its_modules():
    net, x = tiny_net(), torch.rand(3, 3, 32, 32)
    parts = erpm.stages(net)
    assert len(parts) == 4 and parts[1] is net[1] and parts[-1].fc is net[-1]
    assert torch.equal(parts(x), net(x))


@pytest.mark.parametrize("name, says", [
    ("resnet50", "expected FAMILY:NAME"), ("timmm:resnet50", "did you mean 'timm'?"),
    ("timm:resnet5", "timm has no network 'resnet5'; did you mean"),
    ("cifar:resnet21", "expected cifar:resnetD"), ("run:nowhere", "no trained model nowhere"),
])
def test_an_unknown_network_is_one_clear_line(name, says):
    with pytest.raises(erpm.UserError, match=re.escape(says)):
        erpm.build(name)


def test_what_cannot_be_cut_says_so():
    with pytest.raises(erpm.UserError, match="cannot be cut into stages: known are"):
        erpm.stages(nn.Linear(3, 3))
    with pytest.raises(erpm.UserError, match="tune = 9"):
        erpm.Student(tiny_net(), tune=9)
    with pytest.raises(erpm.UserError, match="5 outputs for 7 classes"):
        erpm.Student(tiny_net(), classes=7)


def test_weights_are_loaded_strictly_and_never_unpickled(tmp_path):
    net = erpm.build("cifar:resnet8")
    erpm.save_weights(tmp_path / "a.safetensors", net, {"name": net.name})
    with pytest.raises(erpm.UserError, match=r"of another shape .*fc|of another shape \d+"):
        erpm.build("cifar:resnet8-w2", weights=str(tmp_path / "a.safetensors"))
    with pytest.raises(erpm.UserError, match="missing .* unexpected"):
        erpm.build("cifar:resnet14", weights=str(tmp_path / "a.safetensors"))
    (tmp_path / "b.pth").write_text("not weights")
    with pytest.raises(erpm.UserError, match="is not a .safetensors file, nor one of torch.save"):
        erpm.build("cifar:resnet8", weights=str(tmp_path / "b.pth"))


def test_a_network_normalises_and_resizes_for_itself():
    net = erpm.Net(nn.Identity(), name="x", n_classes=1, mean=(.5, .4, .3), std=(.2, .2, .1),
                   size_px=48)
    x = images(2, 32)
    assert net(x).shape[-1] == 48 and torch.equal(net(x), net(x.float() / 255))
    net.size_px = 0
    want = (x.float() / 255 - torch.tensor([.5, .4, .3]).view(3, 1, 1)) / torch.tensor(
        [.2, .2, .1]).view(3, 1, 1)
    assert torch.equal(net(x), want)


# ==== method ====

def student(**kw):
    torch.manual_seed(1)
    return erpm.Student(tiny_net(), **{"tune": 2, "head": 1, "dropout": 0.3, **kw}).eval()


@pytest.mark.parametrize("head", [0, 1, 2])
def test_before_tuning_every_head_is_the_original_network(head):
    s, x = student(head=head), torch.rand(4, 3, 32, 32)
    for z in (*s(x), s.original(s.features(x))):
        assert torch.equal(z, tiny_net()(x))


def test_clean_head_sees_no_augmented_image_and_robust_head_no_clean_one():
    s, f = student(), torch.rand(6, 8, 16, 16)
    z = s.tuned(f, 2)
    assert [len(h) for h in z] == [2, 6, 4]
    grads = {name: torch.autograd.grad(h.sum(), s.tuned.heads[name][-1].fc.weight,
                                       retain_graph=True)[0] for name, h in z._asdict().items()}
    assert all(g.abs().sum() > 0 for g in grads.values())
    assert (torch.allclose(z.clean, s.tuned(f[:2]).clean)
            and torch.allclose(z.robust, s.tuned(f[2:]).robust))


@pytest.mark.parametrize("kind", ["sequential", "vit"])
def test_dropout_is_live_where_a_pretrained_network_has_none(kind):
    net = tiny_net() if kind == "sequential" else erpm.build("timm:vit_tiny_patch16_224", 5)
    s = erpm.Student(net, 2, 1, 0.3)
    drops = [m for m in s.tuned.modules() if isinstance(m, erpm.Dropout)]
    assert len(drops) >= 1 + 3 + 3 and all(d.p == 0.3 for d in drops)
    only = erpm.Student(tiny_net(), 2, 1, 0.3, dropout_in="head")
    assert sum(isinstance(m, erpm.Dropout) for m in only.tuned.modules()) == 3


def test_training_mode_switches_dropout_and_nothing_else():
    s = student().train()
    live = {type(m).__name__ for m in s.modules() if m.training}
    assert live <= {"Student", "ThreeHeads", "Dropout"} and "Dropout" in live
    assert not any(m.training for m in s.eval().modules())


def test_the_frozen_part_stays_equal_bit_for_bit(tmp_path):
    s = student()
    frozen = {k: v.clone() for k, v in s.state_dict().items() if not k.startswith("tuned.")}
    stats = {k: v.clone() for k, v in s.tuned.state_dict().items()
             if "running" in k or "num_b" in k}
    before = s.tuned.heads["clean"][-1].fc.weight.clone()
    data = erpm.ImageSet("x", np.arange(32) % 5, "abcde", erpm.View(32), images=images(32))
    step = erpm.erpm_step(s, tiny_net_on_uint8(), erpm.Distill(), erpm.Robustify())
    s.backbone.insert(0, Scale())
    erpm.fit(s.tuned, step, data, erpm.Train(epochs=2, batch=16), erpm.Runtime(amp="none"),
             out=tmp_path, name="t", seed=0, key={})
    assert not torch.equal(before, s.tuned.heads["clean"][-1].fc.weight)
    s.backbone.pop(0)
    assert all(torch.equal(v, s.state_dict()[k]) for k, v in frozen.items())
    assert all(torch.equal(v, s.tuned.state_dict()[k]) for k, v in stats.items())


class Scale(nn.Module):
    def forward(self, x):
        return x.float() / 255


def tiny_net_on_uint8():
    return nn.Sequential(Scale(), tiny_net()).requires_grad_(False)


def test_head_loss_is_the_formula_worked_by_hand():
    z, zt, y, a, t = (
        np.array([[1., 2, 0], [0, 1, 1]]), np.array([[0., 3, 1], [2, 0, 1]]), [1, 0], 0.3, 2.0)
    soft = lambda v: np.exp(v) / np.exp(v).sum(-1, keepdims=True)              # noqa: E731
    ce = -np.log(soft(z)[[0, 1], y]).mean()
    p, q = soft(zt / t), soft(z / t)
    want = (1 - a) * ce + a * t * t * (p * np.log(p / q)).sum(-1).mean()
    got = erpm.head_loss(torch.tensor(z), torch.tensor(zt), torch.tensor(y), a, t)
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


@pytest.mark.parametrize("where", ["tail", "head", "vit"])
def test_batched_passes_equal_one_pass_after_another(where):
    s = student(dropout_in=where) if where != "vit" else erpm.Student(
        erpm.build("timm:vit_tiny_patch16_224", 5), 2, 1, 0.3)
    f, t = s.features(torch.rand(3, 3, *(2 * [32 if where != "vit" else 224]))), 4
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
    s, x = student(), torch.rand(8, 3, 32, 32)
    for passes in (0, 5):
        whole, alone = s.predict(x, passes), s.predict(x[2:3], passes)
        assert torch.allclose(whole.probs[2:3], alone.probs, atol=1e-6)
        assert torch.allclose(whole.sigma[2:3], alone.sigma, atol=1e-6)


def test_closed_form_is_the_limit_of_many_passes():
    s = student(tune=2, head=2, dropout=0.05, dropout_in="head")
    f = s.features(torch.rand(16, 3, 32, 32))
    p0, s0, _ = s.moments(f, 0)
    p1, s1, _ = s.moments(f, 4000)
    assert torch.allclose(s0, s1, rtol=0.08, atol=1e-4) and torch.allclose(p0, p1, atol=5e-3)


def test_closed_form_variance_of_a_logit_is_the_textbook_one():
    h, w, p = torch.rand(6), torch.rand(6), 0.2
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


def test_sigma_0_is_refused():
    with pytest.raises(erpm.UserError, match="sigma is 0 everywhere"):
        erpm.select(torch.rand(2, 3, 4), torch.zeros(2, 2), "product")
    with pytest.raises(erpm.UserError, match="needs sigma, which is 0 without dropout"):
        student(dropout=0.0).predict(torch.rand(2, 3, 32, 32))
    assert student(dropout=0.0).predict(torch.rand(2, 3, 32, 32), rule="kl").head.shape == (2,)
    with pytest.raises(erpm.UserError, match="unknown rule 'prodct'; did you mean 'product'?"):
        student().predict(torch.rand(2, 3, 32, 32), rule="prodct")


def test_a_saved_student_comes_back_equal(tmp_path):
    s = erpm.Student(erpm.build("cifar:resnet8", 4), 2, 1, 0.2).eval()
    erpm.save_weights(tmp_path / "model.safetensors", s, erpm.describe(s))
    back, x = erpm.load(tmp_path), images(4)
    assert all(torch.equal(a, b) for a, b in zip(s.predict(x), back.predict(x)))


# ==== training ====

def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [erpm.lr_at(i, 100, 10, 1.0) for i in range(101)]
    assert rates[0] > 0 and max(rates) == rates[10] == 1 and rates[100] == pytest.approx(0)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def quick_fit(out, model=None, step=None, **cfg):
    model = model or erpm.build("cifar:resnet8-s2", 5, "random")
    data = erpm.ImageSet("x", np.arange(64) % 5, "abcde", erpm.View(32), images=images(64))
    settings = {"epochs": 2, "batch": 16, "lr": 1e-3, **cfg}
    erpm.fit(model, step or erpm.clean_step(0.0), data, erpm.Train(**settings),
             erpm.Runtime(amp="none", log_every=1, save_every=3), out=out, name="t", seed=0, key={})
    return model


def seeded_net():
    torch.manual_seed(0)
    return erpm.build("cifar:resnet8-s2", 5)


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    a, b = (quick_fit(tmp_path / str(k), tail_of(seeded_net()), tail_step_of(), accum=k)
            for k in (1, 4))
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.allclose(p, q, atol=2e-5)


def tail_of(net):
    return erpm.Tail(erpm.cut(net, 2)[1].requires_grad_(True))


def tail_step_of():
    return erpm.tail_step(erpm.cut(seeded_net(), 2)[0], erpm.Train(), None)


def test_averaged_weights_are_the_ones_kept(tmp_path):
    plain = quick_fit(tmp_path / "a", seeded_net(), ema=0.0)
    slow = quick_fit(tmp_path / "b", seeded_net(), ema=0.9999)
    start = seeded_net()
    gap = lambda m: sum((p - q).norm()                                         # noqa: E731
                        for p, q in zip(m.parameters(), start.parameters()))
    assert 0 < gap(slow) < 0.01 * gap(plain)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(erpm.UserError, match="the loss is not finite at step 1"):
        quick_fit(tmp_path, step=lambda m, b: (m(b.x).sum() * math.nan, {}))


def test_a_stopped_fit_goes_on_to_the_same_weights(tmp_path):
    whole = quick_fit(tmp_path / "a", seeded_net())
    calls = []

    def interrupting(model, batch):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return erpm.clean_step(0.0)(model, batch)
    with pytest.raises(erpm.Interrupted, match="stopped at step 6 of 8"):
        quick_fit(tmp_path / "b", seeded_net(), interrupting)
    again = quick_fit(tmp_path / "b", seeded_net())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    a, b = (erpm.read_jsonl(tmp_path / d / "log.jsonl") for d in "ab")
    assert [(r["step"], r["loss"]) for r in a] == [(r["step"], r["loss"]) for r in b]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    state = erpm.TrainState(seeded_net(), erpm.Train(), False, tmp_path / "t.ckpt", {"lr": 1})
    state.save()
    other = erpm.TrainState(seeded_net(), erpm.Train(), False, tmp_path / "t.ckpt", {"lr": 2})
    with pytest.raises(erpm.UserError, match="half-done job with other settings .lr: 1 -> 2"):
        other.resume(torch.device("cpu"))


# ==== evaluation and report ====

def test_counts_are_those_of_a_slow_loop():
    s = erpm.Student(erpm.build("cifar:resnet8-s2", 5), 1, 1, 0.3).eval()
    data = erpm.ImageSet("x", np.arange(50) % 5, "abcde", erpm.View(32), images=images(50))
    got = erpm.evaluate(s, data, batch=16, passes=4, amp="none")
    for rule in ("product", "kl", "clean", "soft", "max-logit"):
        p = s.predict(data.images, 4, rule)
        assert got["rules"][rule]["correct"] == int((p.probs.argmax(-1).numpy() == data.y).sum())
        assert got["rules"][rule]["heads"] == torch.bincount(p.head, minlength=3).tolist()
    assert got["sigma"] == pytest.approx(p.sigma.mean(0).tolist(), abs=1e-5)


def fake_row(name="shapes", cell=None, seed=0, label="ERPM", right=6, n=10, **more):
    """A row of results.jsonl: of a Student where the label is ERPM, else of a plain network."""
    corruption, severity = cell or ("", 0)
    row = {"label": label, "weights": f"w{seed}", "set": name, "corruption": corruption,
           "severity": severity, "n": n, "seed": seed, "run": f"r{seed}",
           "trained_on": "shapes", "versions": "v", "rule": "product", "transform": "t",
           "train": {"images": 100, "seconds": 1.0}, "passes": None, "head": "own", "amp": "none",
           "made": "", "partial": False, "images_per_s": 7.0, "source": "here", "limit": 0,
           "probe": "", "prompts": ""}
    found = {"correct": right, "correct5": n - 1, "nll": 1.25, "ece": 0.125}
    if label != "ERPM":
        return {**row, **found, **more}
    rules = {r: {**found, "correct": right + (r == "robust"), "heads": [6, 0, 4]}
             for r in (*erpm.RULES, "product (closed form)")}
    return {**row, "passes": 3, "rules": rules, "sigma": [0.25, 0.5], "kl": [1.5, 0.75], **more}


def fake_rows(seeds=(0, 1), label="ERPM", sets=("shapes", "shapes-c"), **more):
    return [fake_row(s, c, seed, label, right=5 + seed, **more)
            for seed in seeds for s in sets for c in erpm.cells(s)]


def test_report_gives_mean_and_spread_over_seeds():
    text = erpm.report_text(fake_rows())
    assert re.search(r"ERPM +\| 55.00 ± 7.07 +\| 55.00 ± 7.07 +\| 10 ", text)
    assert re.search(r"product +\| .*\| 60.00 ± 0.00 +\| 40.00 ± 0.00", text)
    assert re.search(r"perfect routing +\| 55.00 ± 7.07 +\| 65.00 ± 7.07", text)


def test_a_missing_cell_is_missing_and_never_a_smaller_mean():
    rows = [r for r in fake_rows() if (r["corruption"], r["severity"], r["seed"]) != ("fog", 3, 1)]
    assert re.search(r"ERPM +\| 55.00 ± 7.07 +\| missing", erpm.report_text(rows))


def test_rows_of_older_weights_are_not_mixed_in():
    old = fake_rows((0,))
    new = [fake_row(r["set"], (r["corruption"], r["severity"]), right=9, weights="new")
           for r in old]
    assert re.search(r"ERPM +\| 90.00 +\| 90.00", erpm.report_text(old + new))


# ==== the commands, as a user runs them ====

@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("demo")
    done = command("demo", *TINY, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd, done


def test_demo_leaves_everything_it_promises(demo):
    cwd, done = demo
    left = {p.name for p in (cwd / "runs/demo").iterdir()}
    assert {"student.safetensors", "teacher.safetensors", "model.safetensors", "log.jsonl",
            "config.yaml", "results.jsonl", "report.md", "pictures.png", "apt", "lp",
            *erpm.FIGURES} == left
    assert len(result_rows(cwd / "runs/demo")) == 5 * 77
    for label in ("original", "teacher", "LP", "APT", "ERPM", "perfect routing", "always clean"):
        assert f"| {label} " in done.stdout


def test_a_second_demo_computes_nothing_again(demo):
    cwd, _ = demo
    before = (cwd / "runs/demo/results.jsonl").read_bytes()
    done = command("demo", *TINY, cwd=cwd)
    assert done.returncode == 0 and done.stdout.count("is there, kept") == 7
    assert (cwd / "runs/demo/results.jsonl").read_bytes() == before


@pytest.mark.parametrize("stage, old", [("pretrain", 0.003), ("distill", 0.002)])
def test_changed_settings_do_not_overwrite_a_run(demo, stage, old, monkeypatch, capsys):
    cwd, _ = demo
    monkeypatch.chdir(cwd)
    before = (cwd / "runs/demo/config.yaml").read_bytes()
    line = fails(capsys, stage, *TINY, f"{stage}.lr=0.5")
    assert f"made with other settings ({stage}.lr: {old} -> 0.5)" in line
    assert (cwd / "runs/demo/config.yaml").read_bytes() == before


def test_classes_that_do_not_match_the_set_are_refused(demo, tmp_path, monkeypatch, capsys):
    cwd, _ = demo
    monkeypatch.chdir(cwd)
    make_tree(tmp_path, n=1, splits=("",))
    line = fails(capsys, "eval", "--run", "runs/demo", "--set", f"folder:{tmp_path}")
    assert "not the outputs of original, teacher, APT, LP, ERPM, and there are no training" in line


def test_a_short_cell_of_a_partial_archive_is_scored_and_marked():
    rows = fake_rows((0,), sets=("shapes-c",))
    short = rows[7] | {"n": 5, "partial": True}
    assert "60.00 |" in erpm.report_text(rows)
    text = erpm.report_text([*rows[:7], short, *rows[8:]])
    assert "missing" not in text.split("\n## ")[1] and "*" in text.split("\n## ")[1]


def test_runs_of_two_seeds_in_folders_of_one_name_are_two(tmp_path):
    for seed in (0, 1):
        (tmp_path / f"{seed}/demo").mkdir(parents=True)
        (tmp_path / f"{seed}/demo/results.jsonl").write_text("".join(
            json.dumps(r | {"run": "demo"}) + "\n" for r in fake_rows((seed,))))
    rows = [r for seed in (0, 1) for r in erpm.read_rows(tmp_path / f"{seed}/demo")]
    assert "55.00 ± 7.07" in erpm.report_text([r | {"trained_on": "shapes"} for r in rows])


def test_a_later_smaller_eval_does_not_replace_a_larger_one():
    rows = fake_rows((0,), sets=("shapes",))
    small = [r | {"n": 2, "limit": 2, "weights": r["weights"]} for r in rows]
    assert erpm.report_text(rows + small) == erpm.report_text(rows)


def test_a_smaller_subset_is_part_of_a_larger_one():
    s = erpm.open_set("shapes", erpm.Data(n_test=300))
    assert np.array_equal(s.subset(100).subset(20).index, s.subset(20).index)
    assert set(s.subset(20).index) < set(s.subset(100).index)


def test_two_runs_of_one_seed_are_not_averaged():
    with pytest.raises(erpm.UserError, match="r0 and other both hold ERPM of seed 0"):
        erpm.report_text(fake_rows((0,)) + [r | {"run": "other"} for r in fake_rows((0,))])


def test_two_processes_give_identical_counts(demo, tmp_path):
    cwd, _ = demo
    subprocess.run(["cp", "-r", str(cwd / "runs"), str(tmp_path)], check=True)
    one = counts(tmp_path / "runs/demo")
    (tmp_path / "runs/demo/results.jsonl").unlink()
    in_processes(2, tmp_path, "eval", "run=demo")
    assert counts(tmp_path / "runs/demo") == one


def test_pretrain_with_tune_0_puts_a_linear_probe_on_the_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = erpm.build("cifar:resnet8-s2", 10)
    erpm.save_weights(tmp_path / "w.safetensors", net, {})
    assert erpm.main(["pretrain", "run=x", "data.n_train=200", "pretrain.n_images=0",
                      "model.student=cifar:resnet8-s2", "model.student_weights=w.safetensors",
                      "pretrain.tune=0", "runtime.amp=none"]) == 0
    made = erpm.read_state(tmp_path / "runs/x/student.safetensors")
    same = [k for k, v in net.state_dict().items() if torch.equal(v, made[k])]
    assert set(net.state_dict()) - set(same) == {"net.6.weight", "net.6.bias"}
    images = erpm.open_set("shapes", erpm.Data(n_train=200), "train")
    x = erpm.extract(erpm.frozen_features(net), images, amp="none")
    weight, _, _ = erpm.linear_probe(x, torch.from_numpy(images.y[images.index]), 10)
    assert torch.allclose(weight, made["net.6.weight"], atol=1e-6)


def test_a_run_is_ready_for_another_project(demo):
    cwd, _ = demo
    s = erpm.load(cwd / "runs/demo")
    p = s.predict(images(4))
    assert p.probs.shape == (4, 10) and torch.allclose(p.probs.sum(1), torch.ones(4), atol=1e-5)
    assert isinstance(erpm.build(f"run:{cwd}/runs/demo"), erpm.Student)


def test_torchrun_distill_trains_one_model_on_two_processes(tmp_path):
    done = command("distill", *TINY, cwd=tmp_path, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert "pretrain comes first" in done.stdout and "robustify comes first" in done.stdout
    assert done.stdout.count("model.safetensors: 1,200 images") == 1


def test_sigkill_in_the_middle_of_an_epoch_changes_no_bit(demo, tmp_path):
    cwd, _ = demo
    (tmp_path / "runs/demo").mkdir(parents=True)
    for f in ("student", "teacher"):
        (tmp_path / f"runs/demo/{f}.safetensors").write_bytes(
            (cwd / f"runs/demo/{f}.safetensors").read_bytes())
    p = subprocess.Popen([sys.executable, str(HERE / "erpm.py"), "distill", *TINY], cwd=tmp_path,
                         env=ENV, stdout=subprocess.DEVNULL)
    run, since = tmp_path / "runs/demo", time.time()
    while not (run / "distill.ckpt").is_file() and time.time() - since < 120:
        time.sleep(0.005)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (run / "model.safetensors").exists()
    done = command("distill", *TINY, cwd=tmp_path)
    assert "goes on at step" in done.stdout, done.stderr
    a, b = (erpm.load(d / "runs/demo").state_dict() for d in (cwd, tmp_path))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_signal_to_the_whole_group_stops_cleanly_with_loader_workers(tmp_path):
    make_tree(tmp_path / "set", n=40)
    words = ["pretrain", *TINY, f"data.name=folder:{tmp_path}/set", "data.size_px=32", "run=x",
             "data.n_train=0", "data.n_test=0", "data.workers=2", "pretrain.epochs=400"]
    p = subprocess.Popen([sys.executable, str(HERE / "erpm.py"), *words], cwd=tmp_path, env=ENV,
                         stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    since, log = time.time(), tmp_path / "runs/x/log.jsonl"
    while not (log.is_file() and log.read_text()) and time.time() - since < 120:
        time.sleep(0.05)
    os.killpg(p.pid, signal.SIGINT)
    err = p.communicate(timeout=60)[1].decode()
    assert p.returncode == 130 and "goes on from here" in err and "Traceback" not in err
    assert (tmp_path / "runs/x/pretrain.ckpt").is_file()


def test_a_process_with_a_held_loader_ends(tmp_path):
    make_tree(tmp_path / "set")
    code = (f"import erpm; s = erpm.open_set('folder:{tmp_path}/set', erpm.Data(), 'train')\n"
            "it = iter(erpm.loader(s, erpm.Batches(len(s), 4, 0), 1)); next(it); 1 / 0")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                          timeout=60, env=ENV)
    assert "ZeroDivisionError" in done.stderr


def fails(capsys, *words):
    """The one line that a failing command prints on stderr."""
    assert erpm.main([str(w) for w in words]) == 2
    line = capsys.readouterr().err
    assert line.startswith("erpm.py: ") and line.count("\n") == 1
    return line


def test_an_absent_set_names_folder_count_and_source(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, "eval", "--set", "imagenet-r")
    assert ("data/imagenet-r" in line and "30,000" in line
            and "github.com/hendrycks/imagenet-r" in line)
    assert ("download=True" in fails(capsys, "eval", "--set", "fashion-mnist")
            and not list(tmp_path.iterdir()))


@pytest.mark.parametrize("words, says", [
    (["eval", "--set", "imagenet-rr"], "unknown set 'imagenet-rr'; did you mean 'imagenet-r'?"),
    (["eval", "--set", "shapes", "--model", "timm:resnet500"], "timm has no network 'resnet500'"),
    (["eval", "--set", "shapes", "--model", "timm:resnet18"], "has no weights: add a pretrained"),
    (["distill", "model.student=timm:resnet50.foo"], "no pretrained network 'timm:resnet50.foo'"),
    (["distill", "distill.tune=99"], "tune = 99"),
    (["distill", "distill.dropout=0"], "sigma would be 0 and eval.rule=soft needs it"),
    (["distill", "eval.sets=shape"], "unknown set 'shape'; did you mean 'shapes'?"),
    (["distill", "distill.optimizer=adam"], "did you mean 'adamw'?"),
    (["distill", "distill.accum=7"], "50 images are not 7 equal micro-batches"),
    (["distill", "--config", "none.yaml"], "no file none.yaml"),
    (["eval", "--set", "shapes", "eval.rule=products"],
     "unknown rule 'products'; did you mean 'product'?"),
    (["distill", "--recipe", "imagnet-rn101"], "did you mean 'imagenet-rn101'?"),
    (["distill", "distil.lr=1"], "unknown key 'distil'; did you mean 'distill'?"),
    (["distill", "distill.lr=high"], "expected float, got 'high'"),
    (["distill", "model.student_weights=none.safetensors"], "no weights file none.safetensors"),
    (["eval", "--run", "runs/x", "--set", "shapes"], "no run runs/x: it has no config.yaml"),
    (["eval", "--set", "shapes"], "no trained network in runs/demo"),
    (["report"], "no results in runs/demo"),
    (["distill", "data.name=folder:nowhere"], "no folder nowhere"),
    (["distill", "robustify.augment=augmax"], "augmax"),
    (["distill", "data.name=imagenet-r"], "has no training split"),
    (["eval", "--set", "shapes", "eval.frost_dir=ice"], "eval.frost_dir: no frost1.png in ice"),
])
def test_a_mistake_on_the_command_line_is_one_line_and_code_2(
        words, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, *words, *[t for t in TINY if words[0] == "distill"
                                   and t.split("=")[0] not in str(words)])
    assert says in line


def test_a_folder_with_one_class_or_a_broken_image_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tree(tmp_path / "one", ("cat",))
    assert "holds one class folder (cat)" in fails(
        capsys, "distill", f"data.name=folder:{tmp_path}/one")
    make_tree(tmp_path / "two")
    (tmp_path / "two/val/cat/3.png").write_bytes(b"no picture")
    net = erpm.build("cifar:resnet8", 2)
    erpm.save_weights(tmp_path / "x/model.safetensors", net, erpm.describe(net))
    line = fails(capsys, "eval", "--model", f"run:{tmp_path}/x", "--set",
                 f"folder:{tmp_path}/two", "data.workers=1")
    assert f"cannot read the image {tmp_path}/two/val/cat/3.png" in line


def test_corrupt_writes_the_benchmark_tree_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tree(tmp_path / "in", n=2, splits=("",))
    assert erpm.main(["corrupt", "in", "out", "data.size_px=32", "data.workers=1"]) == 0
    files = sorted(str(p.relative_to("out")) for p in Path("out").rglob("*.png"))
    assert len(files) == 75 * 4 and "snow/3/cat/1.png" in files
    s = erpm.open_set("folder:in", erpm.Data(size_px=32))
    x, _, index = s.__getitems__([(0, 3)])
    want = erpm.corrupt(x, "fog", 2, index=index.tolist())[0].permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(Image.open("out/fog/2/dog/1.png")), want)
    gone, kept = Path("out/fog/2/dog/1.png"), Path("out/fog/3/dog/1.png")
    gone.unlink()
    kept.write_bytes(b"kept")
    gone.with_name("0.png").unlink()
    assert erpm.main(["corrupt", "in", "out", "data.size_px=32", "data.workers=1"]) == 0
    assert gone.is_file() and len(list(Path("out").rglob("*.png"))) == 300
    assert kept.read_bytes() == b"kept"


def test_corrupt_overwrites_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tree(tmp_path / "in", n=1, splits=("",))
    Path("out").mkdir()
    Path("out/mine.txt").write_text("x")
    assert "exists with other content" in fails(capsys, "corrupt", "in", "out")
    assert "lies in" in fails(capsys, "corrupt", "in", "in/out")
    assert "takes two paths" in fails(capsys, "corrupt", "in")
    assert "exists: nothing was written" in fails(
        capsys, "corrupt", "--grid", "in/cat/0.png", "out")
    assert erpm.main(["corrupt", "--grid", "in/cat/0.png", "grid.png", "data.size_px=32"]) == 0
    assert Image.open("grid.png").size == (792, 1680) and os.listdir("out") == ["mine.txt"]


def test_bench_pairs_the_same_work():
    calls = []
    row = erpm.paired(lambda: calls.append("a"), lambda: calls.append("b"), 10, 10, 3)
    assert calls == ["a", "b"] * 4 and row["spread"][0] <= row["ratio"] <= row["spread"][1]
    assert erpm.paired(lambda: time.sleep(0.01), None, 10, 10, 3)["ours"] <= 1000
    assert [r["part"] for r in erpm.bench_corruptions(size=32, n=2)][-2:] == [
        "the 15", "the 14 without glass_blur"]
    parts = [r["part"] for r in erpm.bench_augment(size=32, n=2)]
    assert parts == ["augmix", "augmix + JSD sample", "augmix + JSD sample"]


def test_more_trees_join_the_training_images(tmp_path):
    make_tree(tmp_path / "a")
    make_tree(tmp_path / "b", ("dog", "cat"), n=2, splits=("",))
    s = erpm.open_set(f"folder:{tmp_path}/a", erpm.Data(size_px=32), "train")
    more = erpm.extended(s, str(tmp_path / "b"))
    assert len(more) == len(s) + 4 and len(s) == 12
    x, y, _ = more.__getitems__([(0, 12), (0, 15)])
    assert y.tolist() == [0, 1] and x.shape == (2, 3, 32, 32)
    with pytest.raises(erpm.UserError, match="has other class folders"):
        erpm.extended(erpm.open_set("shapes", erpm.Data()), str(tmp_path / "b"))


def test_sets_lists_every_set(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert erpm.main(["sets"]) == 0
    out = capsys.readouterr().out
    assert all(f"| {name} " in out for name in erpm.SETS)


# ---- REPORT ----

def lines_of(text, part):
    """The lines of the table below a title."""
    after = text.split(f"\n## {part}\n")[1].split("\n## ")[0]
    return {c[0]: c[1:] for c in ([x.strip() for x in line.strip("| ").split("|")]
                                  for line in after.splitlines() if line.startswith("| "))}


def alexnet(shift=0.0):
    """Rows of a network with AlexNet's errors, `shift` points more of them under corruption."""
    row = lambda s, c, error: fake_row(s, c, 0, "x", round(1e4 * (100 - error)),  # noqa
                                      10 ** 6, trained_on="imagenet")
    return [row("imagenet-c", c, erpm.ALEXNET[c[0]] + shift) for c in erpm.cells("imagenet-c")], \
        row("imagenet", None, erpm.ALEXNET_CLEAN)


def test_alexnet_has_mce_100_and_the_published_mean_error():
    rows, clean = alexnet()
    assert erpm.mce(rows) == pytest.approx(1, abs=1e-6)
    assert erpm.relative_mce([*rows, clean]) == pytest.approx(1, abs=1e-6)
    assert list(erpm.ALEXNET) == list(erpm.CORRUPTIONS_15)
    assert sum(erpm.ALEXNET.values()) / 15 == pytest.approx(78.9, abs=0.05)


def test_mce_is_that_worked_by_hand():
    rows, clean = alexnet(shift=5)
    by_hand = [1 + 5 / a for a in erpm.ALEXNET.values()]
    relative = [1 + 5 / (a - 43.478) for a in erpm.ALEXNET.values()]
    text = erpm.report_text([*rows, clean])
    shifts = lines_of(text, "Distribution shifts")
    got = dict(zip(shifts["model"], shifts["x"]))
    assert float(got["mCE"]) == pytest.approx(100 * sum(by_hand) / 15, abs=0.01)
    assert float(got["relative mCE"]) == pytest.approx(100 * sum(relative) / 15, abs=0.01)
    assert got["objectnet"] == "missing" and got["mean of 1 shift"] == got["imagenet-c"]
    per = lines_of(text, "imagenet-c: error relative to AlexNet's")
    assert float(per["fog"][0]) == pytest.approx(100 + 500 / 81.9324, abs=0.01)
    assert lines_of(erpm.report_text(rows), "Distribution shifts")["x"][-1] == "missing"


def test_effective_robustness_is_what_lies_above_the_line():
    p = lambda z: 1 / (1 + math.exp(-z))                                       # noqa: E731
    line = [(p(z), p(2 * z - 1)) for z in (0.0, 0.5, 1.0)]
    assert erpm.effective_robustness(p(0.7), p(0.4) + 0.05, line) == pytest.approx(0.05)
    assert erpm.effective_robustness(p(3), 0.0, line) == pytest.approx(-p(5))
    for name, (_, a, b) in erpm.REFERENCE_SETS.items():       # no standard network stands out
        gaps = [erpm.rho(name)([fake_row("clean", None, 0, "x", v[a], 100),
                                fake_row(name, None, 0, "x", v[b], 100)])
                for v in erpm.REFERENCE.values()]
        assert max(map(abs, gaps)) < 0.06 and abs(sum(gaps)) < 0.05


def test_effective_robustness_needs_the_clean_accuracy_of_the_same_classes():
    rows = [fake_row(s, None, 0, "x", k, 100) for s, k in (("imagenet", 76), ("imagenet-a", 4),
                                                         ("imagenet-v2", 63))]
    text = erpm.report_text(rows)
    effective = lines_of(text, "Effective robustness")
    assert effective["model"] == ["imagenet-v2", "imagenet-a"]
    assert effective["x"][1] == "missing" and -2 < float(effective["x"][0]) < 2
    more = erpm.report_text([*rows, fake_row("imagenet@a", None, 0, "x", 92, 100)])
    assert "missing" not in lines_of(more, "Effective robustness")["x"]
    assert lines_of(more, "The same classes, clean and shifted")["x"] == ["92.00", "4.00", "88.00"]


def test_cells_from_disk_and_made_on_the_fly_are_in_no_mean_together():
    disk = fake_rows((0,), "x", made="disk")
    made = [r | {"made": "regenerated"} for r in disk if r["corruption"]]
    mixed = erpm.report_text(disk + [r for r in made if r["corruption"] == "fog"])
    models = lines_of(mixed, "Models")
    assert models["model"][1] == "shapes-c (regenerated)"
    assert models["x"][:2] == ["50.00", "missing"]
    assert lines_of(erpm.report_text(disk + made), "Models")["x"][1] == "50.00"
    other = [r | {"label": "y"} for r in made]                  # nor in one column
    assert lines_of(erpm.report_text(disk + other), "Models")["x"][1] == "missing"


def test_cells_of_another_transform_are_left_out_but_frost_has_its_own_textures():
    rows = fake_rows((0,), "x")
    for r in rows:
        r["transform"] += ", original frost" * (r["corruption"] == "frost")
    assert lines_of(erpm.report_text(rows), "Models")["x"][1] == "50.00"
    new = [r | {"transform": "224 px"} for r in rows if r["corruption"] == "snow"]
    assert lines_of(erpm.report_text(rows + new), "Models")["x"][1] == "missing"


def test_a_seed_without_a_set_makes_the_set_missing():
    rows = [r for r in fake_rows() if (r["seed"], r["set"]) != (1, "shapes-c")]
    assert lines_of(erpm.report_text(rows), "Models")["ERPM"][:2] == ["55.00 ± 7.07", "missing"]


def test_figures_of_a_part_of_a_set_are_marked():
    rows = fake_rows((0,), "x")
    assert erpm.PARTIAL not in erpm.report_text(rows)
    rows[0]["partial"] = True
    text = erpm.report_text(rows)
    assert lines_of(text, "Models")["x"][:2] == ["50.00*", "50.00"]
    assert text.split("\n## ")[1].rstrip().endswith(erpm.PARTIAL)


def test_top5_nll_ece_sigma_and_kl_stand_in_the_report():
    text = erpm.report_text(fake_rows())
    every = [line for line in text.splitlines() if re.match(r"\| shapes +\| ERPM ", line)]
    assert [c.strip() for c in every[0].split("|")[3:-1]] == [
        "55.00 ± 7.07", "90.00 ± 0.00", "1.250 ± 0.000", "12.50 ± 0.00", "7 ± 0"]
    heads = [line for line in text.splitlines() if re.match(r"\| shapes-c +\| 3 ", line)]
    assert [c.strip().split(" ")[0] for c in heads[0].strip("| ").split("|")[2:]] == [
        "60.00", "0.00", "40.00", "40.00", "0.2500", "0.5000", "1.5000", "0.7500"]


def test_other_heads_are_named_and_other_sets_stand_in_the_transfer_table():
    rows = fake_rows((0,)) + [fake_row("flowers102", head="linear probe (clean)", right=8),
                              fake_row("sun397", None, 0, "clip", 7, head="zero-shot")]
    text = erpm.report_text(rows)
    transfer = lines_of(text, "Transfer")
    assert transfer["model"] == ["flowers102", "sun397"]
    assert transfer["ERPM, linear probe (clean)"] == ["80.00", "missing"]
    assert transfer["clip, zero-shot"] == ["missing", "70.00"]
    assert list(lines_of(text, "Models")) == ["model", "ERPM"] and "Plain networks" not in text


def test_rules_are_averaged_over_the_shifts():
    rows = [fake_row("shapes"), fake_row("shapes-r", right=2)] + [
        fake_row("shapes-c", c) for c in erpm.cells("shapes-c")]
    text = erpm.report_text(rows)
    rules = lines_of(text, "ERPM: which rule picks the head")
    assert rules["rule"] == ["shapes", "mean of 2 shifts", "F shapes", "F mean of 2 shifts"]
    assert rules["kl"] == ["60.00", "40.00", "60.00", "40.00"]
    assert rules["always robust"] == ["70.00", "50.00", "-", "-"]
    assert lines_of(text, "ERPM: every rule on every shift")["kl"] == ["20.00", "60.00"]


def test_published_figures_are_compared_with_a_verdict():
    name = "timm:resnet50.tv_in1k"
    row = lambda s, n, acc, **kw: fake_row(s, None, 0, name, round(n * acc / 100), n, **kw)  # noqa
    rows = [row("imagenet", 50000, 76.15), row("imagenet-r", 30000, 37.0),
            row("imagenet-v2", 10000, 63.6), row("imagenet-sketch", 500, 24.09)]
    lines = [[c.strip() for c in line.split("|")[2:-1]]
             for line in erpm.check_known(rows).splitlines()[2:]]
    got = {c[0]: c[1:] for c in lines}
    assert got["imagenet"] == ["76.13", "76.15", "+0.02", "agrees (within 0.3)"]
    assert got["imagenet-r"] == ["36.17", "37.00", "+0.83", "differs (by more than 0.3)"]
    assert got["imagenet-v2"][-1] == "agrees (within 0.5)" and got["objectnet"][-1] == "missing"
    assert got["imagenet-sketch"][-1] == "missing (500 of 50,889 images)"
    assert "no published figures" in erpm.check_known(fake_rows())


def test_published_mce_is_compared():
    rows = [r | {"label": "DeepAugment+AugMix ResNet-50"} for r in alexnet()[0]]
    assert "missing (1,000,000 of 50,000 images)" in erpm.check_known(rows)
    rows = [r | {"n": 50000, "correct": r["correct"] // 20, "made": "regenerated"} for r in rows]
    line = [c.strip() for c in erpm.check_known(rows).splitlines()[-1].split("|")[2:-1]]
    assert line == ["imagenet-c (regenerated), mCE", "53.60", "100.00", "+46.40",
                    "differs (by more than 1.0)"]


def test_the_pareto_front_holds_what_nothing_beats():
    points = [(1, 5), (2, 4), (2, 7), (3, 7), (4, 9), (1, 3)]
    assert erpm.pareto_front(points) == [(1, 5), (2, 7), (4, 9)]


def test_figures_are_drawn_and_left_out_with_a_line_without_matplotlib(tmp_path, monkeypatch,
                                                                       capsys):
    rows = fake_rows() + fake_rows(label="APT") + [
        r | {"train": {}} for r in fake_rows(label="original")]
    assert erpm.write_figures(rows, tmp_path) == list(erpm.FIGURES)
    for name in erpm.FIGURES:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(10 ** 6)) > 20
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    capsys.readouterr()
    assert erpm.write_figures(rows, tmp_path) == []
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "heads.png left out: matplotlib is not installed" in line


def test_labels_of_points_cover_no_other_label(tmp_path):
    rows = [r for k in range(6) for r in fake_rows((0,), f"net{k}", ("shapes", "shapes-r"),
                                                   train={"images": 9, "seconds": 50.0 + 9 * k})]
    for r in rows:
        r["correct"] += int(r["label"][-1]) % 3
    figure = erpm.figures(rows)["pareto.png"]
    figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in figure.axes[0].texts]
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


# ---- SETS ----

def colour(k):
    """The colour that stands for ImageNet class k: its three decimal digits."""
    return tuple(25 * (k // d % 10) + 12 for d in (100, 10, 1))


def encoded(k, kind="JPEG", size=(20, 14), frame=0):
    """The file of a picture in class k's colour, with a red frame of `frame` px."""
    picture = ImageOps.expand(Image.new("RGB", size, colour(k)), frame, (255, 0, 0))
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def colour_net(x):
    """Reads the class off the picture.  Every fifth class is answered louder by another one."""
    middle = x[:, :, x.shape[2] // 2, x.shape[3] // 2].long() // 25
    k = (middle * torch.tensor([100, 10, 1], device=x.device)).sum(1)
    z = torch.zeros(len(x), 1000, device=x.device).scatter_(1, k[:, None], 2.0)
    louder = torch.where(k % 5 == 0, (k * 37 + 11) % 1000, k)
    return z.scatter_(1, louder[:, None], torch.where(k % 5 == 0, 3.0, 2.0)[:, None])


def mini_imagenet(root):
    """Every set of the ImageNet family in miniature below `root`, with the archives' names: about
    5,000 solid pictures whose colour tells the class."""
    root, names = Path(root), erpm.synsets()
    jpeg, place = [encoded(k) for k in range(1000)], {s: k for k, s in enumerate(names)}

    def put(folder, files):
        os.makedirs(root / folder, exist_ok=True)
        for name, data in files:
            with open(root / folder / name, "wb") as f:
                f.write(data)

    for k, s in enumerate(names):
        put(f"imagenet/val/{s}", [(f"ILSVRC2012_val_{i:08d}.JPEG", jpeg[k])
                                  for i in range(1 + k % 2)])
        put(f"sketch/{s}", [("sketch_0.JPG" if k % 2 else "sketch_0.JPEG", jpeg[k])])
        for variant in ("matched-frequency", "threshold0.7", "top-images")[:1 + 2 * (k < 20)]:
            put(f"imagenetv2-{variant}-format-val/{k}", [("a.jpeg", jpeg[k])])
    for part in "ar":
        for i, s in enumerate(erpm.synsets(part)):
            put(f"imagenet-{part}/{s}", [(f"{n}.jpg", jpeg[place[s]]) for n in range(1 + i % 2)])
    for folder, ids in erpm.OBJECTNET.items():
        put(f"objectnet-1.0/images/{folder}",
            [(f"{i}.png", encoded(i, "PNG", (30, 40), 2)) for i in ids])
    put("objectnet-1.0/images/air_freshener", [("0.png", encoded(0, "PNG", frame=2))])
    for corruption in erpm.CORRUPTIONS_15:
        for severity in range(1, 6):
            for k in (3, 10, 500, 999):
                put(f"ImageNet-C/{corruption}/{severity}/{names[k]}", [("0.JPEG", jpeg[k])])
    put("imagenet/val/__MACOSX", [("._x.JPEG", b"no picture")])
    put("imagenet-a", [(".DS_Store", b""), ("README.txt", b"")])
    put(f"imagenet-r/{erpm.synsets('r')[0]}", [("._0.jpg", b"no picture")])
    return root


def slow_count(files, groups):
    """(n, correct) of colour_net, by the obvious loop: files (path, class number in `groups`),
    groups: the network's outputs of each class."""
    correct = 0
    for path, y in files:
        with Image.open(path) as im:
            middle = im.convert("RGB").getpixel((im.width // 2, im.height // 2))
        k = sum(c // 25 * d for c, d in zip(middle, (100, 10, 1)))
        score = {k: 2.0} | ({(k * 37 + 11) % 1000: 3.0} if k % 5 == 0 else {})
        best = [max(score.get(i, 0.0) for i in ids) for ids in groups]
        correct += best.index(max(best)) == y
    return len(files), correct


def slow_set(root, name):
    """(files, groups) of a miniature set, for slow_count, with none of erpm's code but the class
    lists."""
    names = list(erpm.synsets())
    groups = {"imagenet-a": [[names.index(s)] for s in erpm.synsets("a")],
              "imagenet-r": [[names.index(s)] for s in erpm.synsets("r")],
              "objectnet": list(erpm.OBJECTNET.values())}
    base, _, part = name.partition("@")
    own = groups.get({"": name, "objectnet": "objectnet"}.get(part, f"imagenet-{part}"),
                     [[k] for k in range(1000)])
    folder = {"imagenet": "imagenet/val", "imagenet-sketch": "sketch", "imagenet-a": "imagenet-a",
              "imagenet-v2": "imagenetv2-matched-frequency-format-val",
              "imagenet-v2-threshold": "imagenetv2-threshold0.7-format-val",
              "imagenet-v2-top": "imagenetv2-top-images-format-val", "imagenet-r": "imagenet-r",
              "objectnet": "objectnet-1.0/images"}[base]
    files = []
    for path in sorted((root / folder).glob("*/*")):
        where = path.parent.name
        if path.name.startswith(".") or where == "__MACOSX":
            continue
        if name == "objectnet":
            if where in erpm.OBJECTNET:
                files.append((path, list(erpm.OBJECTNET).index(where)))
            continue
        k = int(where) if "v2" in base else names.index(where)
        files += [(path, y) for y, ids in enumerate(own) if k in ids]
    return files, own


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return mini_imagenet(tmp_path_factory.mktemp("mini"))


def partial_data(root, **more):
    return erpm.Data(root=str(root), allow_partial=True, **{"size_px": 32} | more)


MINI_SETS = {"imagenet": 1500, "imagenet-v2": 1000, "imagenet-v2-threshold": 20,
             "imagenet-v2-top": 20, "imagenet-a": 300, "imagenet-r": 300, "imagenet-sketch": 1000,
             "objectnet": 125, "imagenet@a": None, "imagenet@r": None, "imagenet@objectnet": None}


def mini_figures(root):
    """Figures of colour_net on every miniature set, and on a cell of ImageNet-C's files."""
    sets = {name: erpm.open_set(name, partial_data(root)) for name in [*MINI_SETS, "imagenet-c"]}
    sets["imagenet-c"] = erpm.open_cell(sets["imagenet-c"], ("fog", 3))[0]
    return {name: erpm.evaluate(colour_net, s, batch=64) for name, s in sets.items()}


@pytest.fixture(scope="module")
def one_process(mini):
    return mini_figures(mini)


@pytest.mark.parametrize("name, n", MINI_SETS.items())
def test_every_set_of_the_miniature_imagenet_scores_as_a_slow_count_does(mini, one_process, name,
                                                                         n):
    images, got = erpm.open_set(name, partial_data(mini)), one_process[name]
    files, groups = slow_set(mini, name)
    want = slow_count(files, groups)
    assert (got["n"], got["correct"]) == want and images.partial and len(images) == len(files)
    assert n in (None, want[0]) and 0 < want[1] < want[0]
    assert len(images.classes) == len(groups)
    per_class = {"imagenet": 50}.get(name.partition("@")[0], 0)
    assert "@" not in name or images.expected == per_class * sum(map(len, groups))


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
    assert sum(len(many) > 1 for many in erpm.OBJECTNET.values()) == 9
    assert list(erpm.OBJECTNET) == sorted(erpm.OBJECTNET)
    for name in ("objectnet", "objectnet-c"):
        images = erpm.open_set(name, partial_data(mini), view=erpm.View(32, 1.0, squash=True))
        x, y, index = images.__getitems__([(0, p) for p in range(0, 125, 6)])
        want = torch.tensor([colour(int(Path(images.paths[i]).stem)) for i in index])
        assert torch.equal(x, want[:, :, None, None].to(torch.uint8).expand_as(x))
    assert (images.made, images.view) == ("regenerated", erpm.View())
    with pytest.raises(erpm.UserError, match="no training split"):
        erpm.open_set("objectnet", partial_data(mini), "train")


def test_imagenet_c_is_read_from_disk_cell_by_cell(mini):
    images = erpm.open_set("imagenet-c", partial_data(mini), view=erpm.View(288, 0.9, "bicubic"))
    assert (images.made, images.view, len(images)) == ("disk", erpm.View(224, 1.0), 4)
    assert images.cells_dir == mini / "ImageNet-C"
    for cell in erpm.cells("imagenet-c"):
        cut, rest = erpm.open_cell(images, cell)
        assert rest is None and cut.y.tolist() == [3, 10, 500, 999] and cut.partial
        assert all(f"/{cell[0]}/{cell[1]}/" in p for p in cut.paths)
    assert erpm.evaluate(colour_net, cut)["correct"] == 2          # 10 and 500 are drowned out
    few = erpm.open_cell(images.subset(2), cell)[0]
    assert np.array_equal(few.index, images.subset(2).index)
    with pytest.raises(erpm.UserError, match="4 images in .*gaussian_noise/1, expected 50,000"):
        erpm.open_set("imagenet-c", erpm.Data(root=str(mini)))


def test_a_224_px_file_of_imagenet_c_is_not_touched(tmp_path):
    for c, s in erpm.cells("imagenet-c"):                          # the tars' groups in between
        group = ("noise", "blur", "weather", "digital")[
            (erpm.CORRUPTIONS_15.index(c) >= np.array([3, 7, 11])).sum()]
        folder = tmp_path / "imagenet-c" / group / c / str(s) / "n01440764"
        folder.mkdir(parents=True)
        (folder / "ILSVRC2012_val_00000293.JPEG").write_bytes(b"")
    x = images(1, 224)[0]
    file = tmp_path / "imagenet-c/weather/fog/3/n01440764/ILSVRC2012_val_00000293.JPEG"
    Image.fromarray(x.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=85)
    cut, _ = erpm.open_cell(erpm.open_set("imagenet-c", partial_data(tmp_path)), ("fog", 3))
    want = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    assert torch.equal(cut.__getitems__([(0, 0)])[0][0], want)


def test_an_archive_that_lacks_cells_is_refused(tmp_path, mini):
    for c in ("fog", "snow"):
        (tmp_path / "Tiny-ImageNet-C" / c / "1/n01443537").mkdir(parents=True)
    with pytest.raises(erpm.UserError, match=r"73 of the 75 cells .* \(gaussian_noise/1, "):
        erpm.open_set("tiny-imagenet-c", partial_data(tmp_path))


def test_without_an_archive_cells_are_made_from_the_benchmarks_own_view(mini, tmp_path):
    (tmp_path / "imagenet").symlink_to(mini / "imagenet")
    view = erpm.View(336, 1.0, "bicubic", squash=True)
    images = erpm.open_set("imagenet-c", partial_data(tmp_path), view=view)
    assert (images.made, images.view) == ("regenerated", erpm.View(224, 0.875, "bilinear"))
    assert erpm.open_cell(images, ("fog", 1)) == (images, ("fog", 1))
    clean = erpm.open_set("imagenet", partial_data(tmp_path, size_px=0), view=view)
    assert (clean.made, clean.view) == ("", view)
    assert erpm.open_cell(clean, None) == (clean, None)


def test_a_half_unpacked_set_is_refused_with_both_counts(mini, monkeypatch):
    data = erpm.Data(root=str(mini), size_px=32)
    with pytest.raises(erpm.UserError, match="1,500 images in .*val, expected 50,000"):
        erpm.open_set("imagenet", data)
    with pytest.raises(erpm.UserError, match="1,500 images in .*val, expected 50,000"):
        erpm.open_set("imagenet@a", data)
    row = erpm.dataclasses.replace(erpm.SETS["imagenet"], n_test=1500)
    monkeypatch.setitem(erpm.SETS, "imagenet", row)
    assert not erpm.open_set("imagenet", data).partial


def test_sets_and_parts_that_do_not_exist_are_named(mini):
    for name, says in (("imagenet@b", "unknown part of ImageNet 'b'"),
                       ("imagenet-c@a", "unknown set of all of ImageNet's classes"),
                       ("cifar10@a", "unknown set of all"), ("imagenet-d", "did you mean")):
        with pytest.raises(erpm.UserError, match=says):
            erpm.open_set(name, partial_data(mini))
    with pytest.raises(erpm.Absent, match="looked for .*tiny-imagenet-200.*cs231n"):
        erpm.open_set("tiny-imagenet", partial_data(mini))


def test_a_folder_that_is_no_class_of_the_set_is_refused(tmp_path):
    names = erpm.synsets("r")
    make_tree(tmp_path / "imagenet-r", (names[0], "n00000001"), n=1, splits=("",))
    with pytest.raises(erpm.UserError, match="n00000001 is none of its 200 classes"):
        erpm.open_set("imagenet-r", partial_data(tmp_path))
    make_tree(tmp_path / "imagenet-v2", ("0", "1000"), n=1, splits=("",))
    with pytest.raises(erpm.UserError, match="1000 is none of its 1000 classes"):
        erpm.open_set("imagenet-v2", partial_data(tmp_path))


@pytest.mark.parametrize("name, folder", [
    ("imagenet", "ILSVRC2012/val"), ("imagenet", "ILSVRC/Data/CLS-LOC/val"), ("imagenet", "val"),
    ("imagenet", "ImageNet/ILSVRC2012_img_val"), ("imagenet-a", "ImageNet_A/imagenet-a"),
    ("imagenet-r", "ImageNet-R"), ("imagenet-sketch", "ImageNet-Sketch/sketch"),
    ("imagenet-sketch", "imagenet-sketch"), ("imagenet-v2", "ImageNetV2-matched-frequency"),
    ("imagenet-v2-top", "imagenet-v2/imagenetv2-top-images-format-val")])
def test_folders_are_found_under_their_usual_names(tmp_path, name, folder):
    part = {"imagenet-a": "a", "imagenet-r": "r"}.get(name, "")
    put_files(tmp_path / folder, {f"{erpm.synsets(part)[7]}/x.JPEG": encoded(7)})
    s = erpm.open_set(name, partial_data(tmp_path))
    assert s.y.tolist() == [7] and s.source == str(tmp_path / folder)


def put_files(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())


class FakeScipy:
    """Stands for scipy.io: `loadmat` gives what `content` says of a file's name."""

    def __init__(self, monkeypatch, content):
        monkeypatch.setitem(sys.modules, "scipy", self)
        monkeypatch.setitem(sys.modules, "scipy.io", self)
        self.io, self.content = self, content

    def loadmat(self, path, squeeze_me):
        if not Path(path).is_file():
            raise FileNotFoundError(path)
        return self.content[Path(path).name]


VAL = {f"ILSVRC2012_val_{i:08d}.JPEG": k for i, k in ((1, 65), (2, 970), (4, 809), (5, 0))}
VAL_LINES = ("n01751748", "n09193705", "n02105855", "n04263257", "n01440764")   # of images 1 to 5
DEVKIT = "ILSVRC2012_validation_ground_truth.txt"


@pytest.mark.parametrize("where, truth, text", [
    ("ILSVRC/Data/CLS-LOC/val", "LOC_val_solution.csv", "ImageId,PredictionString\n" + "".join(
        f"{n[:-5]},{erpm.synsets()[k]} 85 1 499 272 {erpm.synsets()[k]} 0 0 9 9 \n"
        for n, k in reversed(VAL.items()))),
    ("imagenet/val", "imagenet/val.txt", "".join(f"{n} {k}\n" for n, k in VAL.items())),
    ("val", "caffe_ilsvrc12/val.txt", "".join(f"{n} {k}\n" for n, k in VAL.items())),
    ("imagenet/ILSVRC2012_img_val", "imagenet/imagenet_2012_validation_synset_labels.txt",
     "\n".join(VAL_LINES) + "\n"),
    ("ILSVRC2012/val", "ILSVRC2012/synset_labels.txt", "\n".join(VAL_LINES)),
    ("imagenet/val", f"imagenet/ILSVRC2012_devkit_t12/data/{DEVKIT}", "490\n361\n171\n822\n449\n"),
])
def test_flat_validation_images_get_their_labels_from_any_public_file(
        tmp_path, monkeypatch, where, truth, text):
    ids = {490: 65, 361: 970, 171: 230, 822: 809, 449: 0}
    FakeScipy(monkeypatch, {"meta.mat": {"synsets": [
        {"ILSVRC2012_ID": i, "WNID": erpm.synsets()[k]} for i, k in ids.items()]
        + [{"ILSVRC2012_ID": 1001, "WNID": "n00001740"}]}})        # a node above the 1000 classes
    put_files(tmp_path / where, {n: encoded(k) for n, k in VAL.items()})
    put_files(tmp_path, {truth: text, truth.replace(DEVKIT, "meta.mat") + " ": b""})
    if DEVKIT in truth:
        put_files(tmp_path, {truth.replace(DEVKIT, "meta.mat"): b""})
    s = erpm.open_set("imagenet", partial_data(tmp_path))
    assert {Path(p).name: y for p, y in zip(s.paths, s.y.tolist())} == VAL
    assert s.y.tolist() == sorted(VAL.values())                    # as class folders would be


def test_flat_validation_images_without_a_usable_ground_truth_say_what_is_wanted(
        tmp_path, monkeypatch):
    put_files(tmp_path / "imagenet/val", {n: encoded(k) for n, k in VAL.items()})

    def fails_with(says, **files):
        put_files(tmp_path / "imagenet", files)
        with pytest.raises(erpm.UserError, match=says):
            erpm.open_set("imagenet", partial_data(tmp_path))

    fails_with("holds no class folders: .*LOC_val_solution.csv")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    fails_with("needs scipy: pip install scipy, or put LOC_val", **{DEVKIT: "490\n"})
    FakeScipy(monkeypatch, {})
    fails_with("no file .*meta.mat", **{DEVKIT: "490\n"})
    fails_with("does not name .*00000004.JPEG", **{"val.txt": "\n".join(
        f"{n} {k}" for n, k in VAL.items() if "4" not in n)})
    fails_with("50000 is no label of ImageNet", **{                # ImageSets/CLS-LOC: a counter
        "val.txt": "ILSVRC2012_val_00000001 1\nILSVRC2012_val_00050000 50000\n"})
    (tmp_path / "imagenet/val.txt").unlink()
    for path in (tmp_path / "imagenet/val").iterdir():             # names that end in the synset
        path.rename(path.with_name(f"{path.stem}_{erpm.synsets()[VAL[path.name]]}.JPEG"))
    s = erpm.open_set("imagenet", partial_data(tmp_path))
    assert s.y.tolist() == sorted(VAL.values())


def small_row(monkeypatch, name, **changes):
    monkeypatch.setitem(erpm.SETS, name, erpm.dataclasses.replace(erpm.SETS[name], **changes))


@pytest.mark.parametrize("layout", ("annotations", "folders", "folders/images"))
def test_tiny_imagenet_is_read_as_published_or_sorted(tmp_path, monkeypatch, layout):
    small_row(monkeypatch, "tiny-imagenet", n_train=4, n_test=3, n_classes=2)
    top, wnids = tmp_path / "tiny-imagenet-200", ("n02124075", "n01443537")   # not in text order
    put_files(top, {"wnids.txt": "\n".join(wnids), "test/images/test_0.JPEG": encoded(0)} | {
        f"train/{w}/images/{w}_{i}.JPEG": encoded(1, size=(64, 64)) for w in wnids for i in (0, 1)})
    of = dict(zip(("val_0.JPEG", "val_1.JPEG", "val_2.JPEG"), (wnids[0], wnids[1], wnids[0])))
    middle = {"annotations": "images/", "folders": "{}/", "folders/images": "{}/images/"}[layout]
    put_files(top / "val", {middle.format(w) + n: encoded(2, size=(64, 64)) for n, w in of.items()}
              | {"val_annotations.txt": "".join(f"{n}\t{w}\t0\t32\t44\t62\n"
                                                for n, w in of.items())})
    (top / "val/images").mkdir(exist_ok=True)
    s = erpm.open_set("tiny-imagenet", erpm.Data(root=str(tmp_path)), view=erpm.View(224))
    assert s.classes == sorted(wnids) and s.view == erpm.View(64, 1.0) and not s.partial
    assert {Path(p).name: s.classes[y] for p, y in zip(s.paths, s.y)} == of
    assert erpm.open_set("tiny-imagenet", erpm.Data(root=str(tmp_path)), "train").y.tolist() == [
        0, 0, 1, 1]
    want = torch.from_numpy(np.array(Image.open(s.paths[0]))).permute(2, 0, 1)
    assert torch.equal(s.__getitems__([(0, 0)])[0][0], want)


def test_tiny_imagenet_c_and_cifar_c_are_read_from_disk(tmp_path, monkeypatch):
    small_row(monkeypatch, "tiny-imagenet", n_test=2, n_classes=2)
    small_row(monkeypatch, "cifar10", n_test=4)
    rng, data = np.random.default_rng(0), erpm.Data(root=str(tmp_path))
    folder, y = tmp_path / "CIFAR-10-C", np.tile(np.array([3, 8, 8, 0], np.uint8), 5)
    folder.mkdir()
    np.save(folder / "labels.npy", y)
    arrays = {}
    for c, s in erpm.cells("cifar10-c"):
        if s == 1:
            arrays[c] = rng.integers(0, 256, (20, 32, 32, 3), np.uint8)
            np.save(folder / f"{c}.npy", arrays[c])
        put_files(tmp_path / "Tiny-ImageNet-C" / c / str(s), {
            "n02124075/a.JPEG": encoded(s, size=(64, 64)), "n01443537/b.JPEG": encoded(9)})
    images = erpm.open_set("cifar10-c", data)
    assert (images.made, images.cells_dir, images.partial) == ("disk", folder, False)
    for c, s in (("fog", 1), ("jpeg_compression", 5)):
        cut, rest = erpm.open_cell(images, (c, s))
        x = cut.__getitems__([(0, p) for p in range(4)])[0]
        assert rest is None and cut.y.tolist() == [3, 8, 8, 0]
        assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), arrays[c][4 * s - 4:4 * s])
    assert erpm.evaluate(lambda x: F.one_hot(x[:, 0, 0, 0].long(), 256), cut)["n"] == 4
    np.save(folder / "labels.npy", y[:-1])
    with pytest.raises(erpm.UserError, match="holds 20 images, labels.npy 19"):
        erpm.open_cell(images, ("fog", 1))
    cut, _ = erpm.open_cell(erpm.open_set("tiny-imagenet-c", data), ("snow", 4))
    assert [Path(p).name for p in cut.paths] == ["b.JPEG", "a.JPEG"] and cut.y.tolist() == [0, 1]


def test_flowers_take_the_official_split_with_train_and_val_to_train_on(tmp_path, monkeypatch):
    data, top = erpm.Data(root=str(tmp_path)), tmp_path / "flowers-102"
    small_row(monkeypatch, "flowers102", n_train=2, n_test=3)
    put_files(top, {f"jpg/image_{i:05d}.jpg": encoded(i) for i in range(1, 6)})
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(erpm.UserError, match="needs scipy: pip install scipy, or class folders"):
        erpm.open_set("flowers102", data)
    splits = {"trnid": np.array([4]), "valid": np.array([1]), "tstid": np.array([5, 2, 3])}
    labels = {"labels": np.array([77, 1, 102, 1, 5])}
    FakeScipy(monkeypatch, {"imagelabels.mat": labels, "setid.mat": splits})
    with pytest.raises(erpm.UserError, match="no file .*imagelabels.mat"):
        erpm.open_set("flowers102", data)
    put_files(top, {"imagelabels.mat": b"", "setid.mat": b""})
    test, train = erpm.open_set("flowers102", data), erpm.open_set("flowers102", data, "train")
    assert test.y.tolist() == [4, 0, 101] and train.y.tolist() == [0, 76]
    assert [Path(p).name for p in test.paths] == [f"image_0000{i}.jpg" for i in (5, 2, 3)]
    assert test.classes[0] == "pink primrose" and len(test.classes) == 102
    (top / "jpg/image_00003.jpg").unlink()
    with pytest.raises(erpm.UserError, match="2 images in .*flowers-102, expected 3"):
        erpm.open_set("flowers102", data)


@pytest.mark.parametrize("name, halves, n", [
    ("flowers102", ("train", "valid", "test"), 4), ("sun397", ("train", "val"), 2),
    ("places205", ("train", "val"), 2), ("inaturalist2021", ("train_mini", "val"), 2),
    ("inaturalist2021", ("../2021_train_mini", "../2021_valid"), 2)])
def test_transfer_sets_are_read_from_class_folders(tmp_path, monkeypatch, name, halves, n):
    small_row(monkeypatch, name, n_train=n, n_test=2, n_classes=2)
    for h in halves:
        put_files(tmp_path / name / h, {"b/1.jpg": encoded(1), "a/1.jpg": encoded(0)})
    data = erpm.Data(root=str(tmp_path))
    test, train = erpm.open_set(name, data), erpm.open_set(name, data, "train")
    assert test.classes == train.classes == ["a", "b"] and test.y.tolist() == [0, 1]
    assert len(train) == n and halves[-1].split("/")[-1] in test.source
    small_row(monkeypatch, name, n_classes=3)
    with pytest.raises(erpm.UserError, match="2 classes in .*, expected 3"):
        erpm.open_set(name, partial_data(tmp_path))


@pytest.mark.parametrize("where", ("SUN397", "SUN397/Partitions", "Partitions"))
def test_sun397_and_places205_go_by_their_lists(tmp_path, monkeypatch, where):
    small_row(monkeypatch, "sun397", n_train=1, n_test=2, n_classes=2)
    small_row(monkeypatch, "places205", n_train=1, n_test=3, n_classes=2)
    data = erpm.Data(root=str(tmp_path))
    put_files(tmp_path / where, {
        "ClassName.txt": "/a/abbey\n/a/apse/indoor\n", "Training_01.txt": "/a/abbey/sun_1.jpg\n",
        "Testing_01.txt": "/a/apse/indoor/sun_2.jpg\r\n/a/abbey/sun_3.jpg\r\n"})
    put_files(tmp_path / "SUN397/a", {
        n: encoded(5) for n in ("abbey/sun_1.jpg", "abbey/sun_3.jpg", "apse/indoor/sun_2.jpg",
                                "abbey/sun_of_no_split.jpg")})
    test, train = erpm.open_set("sun397", data), erpm.open_set("sun397", data, "train")
    assert test.classes == ["abbey", "apse/indoor"] and test.y.tolist() == [1, 0]
    assert train.paths == [str(tmp_path / "SUN397/a/abbey/sun_1.jpg")]
    lists = "trainvalsplit_places205/" * (where == "SUN397")
    deep = "data/vision/torralba/deeplearning/images256/" * (where != "Partitions")
    put_files(tmp_path / "places205", {
        f"{lists}train_places205.csv": "y/yard/gsun_1.jpg 1\n", f"{lists}val_places205.csv":
        "y/yard/gsun_2.jpg 1\na/abbey/gsun_3.jpg 0\na/abbey/gsun_4.jpg 0\n"} | {
        f"{deep}{p}": encoded(3) for p in ("y/yard/gsun_1.jpg", "y/yard/gsun_2.jpg",
                                           "a/abbey/gsun_3.jpg", "a/abbey/gsun_4.jpg")})
    test, train = erpm.open_set("places205", data), erpm.open_set("places205", data, "train")
    assert test.classes == ["abbey", "yard"] and test.y.tolist() == [1, 0, 0]
    assert train.y.tolist() == [1] and train.paths[0].endswith("y/yard/gsun_1.jpg")


def test_sets_check_opens_every_image_and_lists_the_broken_ones(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_row(monkeypatch, "tiny-imagenet", n_test=2, n_classes=2)
    for name in ("imagenet-v2", "shapes", "shapes-r"):
        small_row(monkeypatch, name, n_test=2)
    put_files(tmp_path / "data/imagenet-v2", {"0/a.jpg": encoded(0), "999/a.jpg": encoded(1)})
    for c, s in erpm.cells("tiny-imagenet-c"):
        put_files(tmp_path / "data/Tiny-ImageNet-C" / c / str(s), {
            "n02124075/a.JPEG": encoded(s), "n01443537/b.JPEG": encoded(9)})
    words = ["sets", "--check", "data.workers=1"]
    assert erpm.main(words) == 0
    assert "152 image files opened" in capsys.readouterr().out
    cut = tmp_path / "data/Tiny-ImageNet-C/fog/2/n02124075/a.JPEG"
    cut.write_bytes(encoded(0, size=(90, 90))[:700])               # ends in the middle
    (tmp_path / "data/imagenet-v2/0/a.jpg").write_bytes(b"no picture")
    assert erpm.main(words) == 2
    out, err = capsys.readouterr()
    assert out.count("cannot read the image") == 2 and str(cut.relative_to(tmp_path)) in out
    assert "2 faults in the sets" in err and err.count("\n") == 1
    line = next(t for t in out.splitlines() if t.startswith("| imagenet-v2 "))
    assert [c.strip() for c in line.split("|")][2:6] == ["2", "2", "1000", "data/imagenet-v2"]


# ---- ANY BACKBONE ----

TINY_TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 1, "layers": 1}
TINY_VIT = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16}
TINY_CLIPS = {                                      # configurations in open_clip's own file format
    "tiny": {"vision_cfg": TINY_VIT},
    "tiny-quickgelu": {"vision_cfg": TINY_VIT, "quick_gelu": True},
    "tiny-avg": {"vision_cfg": {**TINY_VIT, "pool_type": "avg", "final_ln_after_pool": True,
                                "no_ln_pre": True, "ls_init_value": 0.1}},
    "tiny-coca": {"vision_cfg": {**TINY_VIT, "attentional_pool": True, "attn_pooler_heads": 2,
                                 "output_tokens": True}, "custom_text": True},
    "tiny-rn": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8,
                               "patch_size": None}},
    "tiny-timm": {"vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "map",
                                 "timm_proj": "none", "image_size": 160}, "embed_dim": 64},
    "tiny-timm-linear": {"vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "",
                                        "timm_proj": "linear", "image_size": 64}},
    "tiny-timm-own": {"vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "token",
                                     "timm_proj": None, "image_size": 160}},
}


@pytest.fixture(scope="session")
def tiny_clips(tmp_path_factory):
    """Registers the tiny configurations with open_clip under their names."""
    import open_clip
    folder = tmp_path_factory.mktemp("clips")
    for name, cfg in TINY_CLIPS.items():
        (folder / f"{name}.json").write_text(json.dumps(
            {"embed_dim": 16, "text_cfg": TINY_TEXT, **cfg}))
    open_clip.add_model_config(folder)


def by_timm(name, **kw):
    import timm
    return lambda: timm.create_model(name, num_classes=7, **kw)


def by_torchvision(make):
    import torchvision
    return lambda: make(torchvision.models)


FAST = {                                            # one small network for each family and quirk
    **{f"open_clip:{n}": f"open_clip:{n}" for n in TINY_CLIPS},
    **{n: n for n in (
        "timm:test_vit", "timm:test_vit2", "timm:test_vit3", "timm:test_resnet",
        "timm:test_convnext", "timm:test_convnext3", "timm:test_efficientnet",
        "timm:mobilenetv3_small_050", "timm:mobilenetv4_conv_small_035", "timm:seresnext26d_32x4d",
        "torchvision:resnet18", "torchvision:mobilenet_v3_small", "torchvision:mobilenet_v2")},
    "vit, token outside pos_embed": by_timm("deit3_small_patch16_224", depth=2, embed_dim=48),
    "vit, registers": by_timm("vit_small_patch14_reg4_dinov2", depth=2, embed_dim=48, img_size=28),
    "eva, rope": by_timm("eva02_tiny_patch14_224", depth=2),
    "eva, rope of a free grid": by_timm("vit_small_patch16_dinov3", depth=2, embed_dim=48,
                                        num_heads=2),
    "eva, a rope for each block": by_timm("vit_small_patch16_rope_mixed_224", depth=2),
    "beit": by_timm("beit_base_patch16_224", depth=2, embed_dim=48, num_heads=2),
    "beit, one bias": by_timm("beit_base_patch16_224", depth=2, embed_dim=48, num_heads=2,
                              use_shared_rel_pos_bias=True, use_rel_pos_bias=False),
    "swin": by_timm("swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 2, 1, 1),
                    num_heads=(1, 1, 2, 2)),
    "swin v2": by_timm("swinv2_tiny_window8_256", embed_dim=12, depths=(1, 2, 1, 1),
                       num_heads=(1, 1, 2, 2), img_size=224, window_size=7),
    "convnext, norm first": by_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 8, 8, 8),
                                    head_norm_first=True),
    "torchvision vit": by_torchvision(lambda m: m.VisionTransformer(
        224, 32, 2, 2, 16, 32, num_classes=7, representation_size=8)),
    "torchvision convnext": by_torchvision(lambda m: m.ConvNeXt(
        [m.convnext.CNBlockConfig(8, 8, 1), m.convnext.CNBlockConfig(8, None, 2)], num_classes=7)),
    "torchvision swin": by_torchvision(lambda m: m.SwinTransformer(
        [4, 4], 12, [1, 2], [1, 2], [7, 7], num_classes=7)),
}
NAMES = """
timm:vit_tiny_patch16_224 timm:vit_small_patch16_224 timm:vit_small_patch32_224
timm:vit_base_patch16_224 timm:vit_base_patch32_224 timm:vit_large_patch16_224
timm:vit_base_patch16_224.mae timm:deit3_small_patch16_224 timm:vit_medium_patch16_reg4_gap_256
timm:vit_small_patch14_dinov2.lvd142m timm:vit_base_patch14_dinov2.lvd142m
timm:vit_base_patch14_reg4_dinov2.lvd142m timm:vit_base_patch16_siglip_224.webli
timm:vit_base_patch16_clip_224.openai timm:vit_small_patch16_dinov3.lvd1689m
timm:vit_small_patch16_rope_mixed_224 timm:eva02_tiny_patch14_224 timm:eva02_base_patch14_224
timm:eva_large_patch14_196 timm:beit_base_patch16_224 timm:beitv2_base_patch16_224
timm:swin_tiny_patch4_window7_224 timm:swin_base_patch4_window7_224 timm:swinv2_tiny_window8_256
timm:convnext_tiny timm:convnext_base timm:convnextv2_tiny timm:resnet18 timm:resnet34
timm:resnet50 timm:resnet101 timm:resnet152 timm:resnext50_32x4d timm:resnext101_32x8d
timm:resnetrs50 timm:efficientnet_b0 timm:efficientnet_b4 timm:tf_efficientnet_lite0
timm:tf_efficientnetv2_s timm:mobilenetv2_100 timm:mobilenetv3_large_100 timm:mobilenetv3_small_100
torchvision:resnet34 torchvision:resnet50/IMAGENET1K_V1 torchvision:resnet101 torchvision:resnet152
torchvision:resnext50_32x4d torchvision:wide_resnet50_2 torchvision:vit_b_16 torchvision:vit_b_32
torchvision:vit_b_16/IMAGENET1K_SWAG_E2E_V1 torchvision:convnext_tiny torchvision:convnext_base
torchvision:swin_t torchvision:swin_v2_t torchvision:efficientnet_b0 torchvision:efficientnet_v2_s
torchvision:mobilenet_v3_large open_clip:ViT-B-32 open_clip:ViT-B-32-quickgelu/openai
open_clip:ViT-B-16-quickgelu open_clip:ViT-L-14-quickgelu open_clip:ViT-L-14-336-quickgelu/openai
open_clip:RN50-quickgelu/openai open_clip:RN101-quickgelu/openai open_clip:ViT-B-16-SigLIP/webli
open_clip:convnext_base open_clip:EVA02-B-16 open_clip:coca_ViT-B-32
open_clip:swin_base_patch4_window7_224""".split() if os.environ.get("ERPM_SLOW") else []


def network(spec):
    """The network of a name or a maker, with random numbers where a fresh one has zeros and ones:
    a scale of 0 would hide a block."""
    torch.manual_seed(0)
    net = erpm.build(spec, 7, "random") if isinstance(spec, str) else spec().eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim < 2 or not p.any():
                p.normal_(0.5, 0.3)
    return net


def side(net):
    return (net.size_px or 64) if isinstance(net, erpm.Net) else 28 if getattr(
        getattr(net, "patch_embed", None), "img_size", None) == (28, 28) else 224


@pytest.mark.usefixtures("tiny_clips")
@pytest.mark.parametrize("spec", [*FAST.values(), *NAMES], ids=[*FAST, *NAMES])
def test_stages_equal_the_network_exactly(spec):
    net = network(spec)
    x, parts = images(1, side(net)) / 255, erpm.stages(net)
    with torch.no_grad():
        z = net(x)
        assert torch.equal(parts(x), z)
    ours, theirs = ({id(p) for p in m.parameters()} for m in (parts, net))
    assert ours == theirs and z.shape == (1, 7) and z.std() > 0 and z.isfinite().all()
    assert len(parts) >= 4 and parts[-1].fc.out_features == 7
    keys = [k for k in parts.state_dict() if "rope." not in k and "rel_pos_bias." not in k]
    assert len(keys) == len([k for k in net.state_dict()
                             if "rope." not in k and not k.startswith("rel_pos_bias.")])


@pytest.mark.usefixtures("tiny_clips")
@pytest.mark.parametrize("label", ["timm:test_vit", "timm:test_efficientnet", "timm:test_convnext",
                                   "torchvision:mobilenet_v3_small", "open_clip:tiny",
                                   "open_clip:tiny-rn", "open_clip:tiny-timm", "swin",
                                   "eva, rope", "torchvision vit"])
def test_a_student_trains_predicts_and_is_loaded_again_on_every_family(label, tmp_path):
    net = network(FAST[label])
    student, x = erpm.Student(net, 2, 1, 0.3), images(2, side(net)) / 255
    kept = {k: v.clone() for k, v in student.state_dict().items()
            if not k.startswith("tuned.") or "running" in k or "num_b" in k}
    before = student.tuned.heads["clean"][0].state_dict()
    before = {k: v.clone() for k, v in before.items()}
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
    if isinstance(net, erpm.Net):
        erpm.save_weights(tmp_path / "model.safetensors", student, erpm.describe(student))
        again = erpm.load(tmp_path).predict(x, passes=3)
        assert torch.allclose(again.probs, p.probs, atol=1e-5)     # other memory, other kernels
        assert torch.allclose(again.sigma, p.sigma, atol=1e-5)


@pytest.mark.usefixtures("tiny_clips")
def test_dropout_stands_in_the_residual_branches_of_a_clip():
    block = erpm.put_dropout(erpm.stages(network("open_clip:tiny"))[2], 0.5, 0)
    assert isinstance(block.ls_1[1], erpm.Dropout) and isinstance(block.ls_2[1], erpm.Dropout)


def test_what_cannot_be_cut_names_the_families():
    with pytest.raises(erpm.UserError, match="timm VisionTransformer, Eva.*torchvision ResNet.*"
                       "open_clip VisionTransformer, ModifiedResNet; or pass"):
        erpm.stages(erpm.build("torchvision:shufflenet_v2_x0_5"))
    with pytest.raises(erpm.UserError, match="without a final Linear layer .*classes=N"):
        erpm.stages(erpm.build("timm:test_vit", 0))


@pytest.mark.parametrize("name, says", [
    ("torchvision:resnet5", "torchvision has no network 'resnet5'; did you mean"),
    ("torchvision:resnet50/V1", "unknown weights of torchvision:resnet50 'V1'"),
    ("open_clip:ViT-B-33", "open_clip has no network 'ViT-B-33'; did you mean 'ViT-B-32'"),
    ("open_clip:ViT-B-32-quickgelu/opnai", "did you mean 'openai'"),
    ("open_clip:ViT-B-32/openai", "use open_clip:ViT-B-32-quickgelu/openai"),
    ("open_clip:roberta-ViT-B-32", "open_clip:roberta-ViT-B-32 could not be built"),
])
def test_an_unknown_name_of_a_family_is_one_clear_line(name, says):
    with pytest.raises(erpm.UserError, match=re.escape(says)):
        erpm.build(name)


@pytest.mark.usefixtures("tiny_clips")
def test_a_tag_says_classes_normalisation_size_and_view():
    assert [erpm.has_tag(n) for n in ("timm:resnet50.tv_in1k", "torchvision:resnet50/DEFAULT",
                                      "open_clip:RN50/openai")] == [True] * 3
    assert [erpm.has_tag(n) for n in ("timm:resnet50", "torchvision:resnet50", "open_clip:RN50",
                                      "cifar:resnet8", "run:a/b.c")] == [False] * 5
    assert [erpm.tag_classes(n) for n in (
        "timm:vit_base_patch16_224.mae", "torchvision:resnet50/DEFAULT", "timm:resnet50.tv_in1k",
        "open_clip:ViT-B-16-SigLIP/webli", "timm:resnet50")] == [0, 1000, 1000, 0, None]
    net = erpm.build("torchvision:mobilenet_v2/IMAGENET1K_V2", 5, "random")
    assert (net.n_classes, net.size_px, net.view) == (5, 224, erpm.View(224, 224 / 232))
    assert net.view.resize_px == 232 and not erpm.build("torchvision:mobilenet_v2").size_px
    net = erpm.build("open_clip:tiny")
    assert (net.n_classes, net.size_px, net.view) == (0, 32, erpm.View(32, 1.0, "bicubic"))
    assert torch.allclose(net.mean.flatten(), torch.tensor([0.4815, 0.4578, 0.4082]), atol=1e-4)
    assert not net.training and net(images(2, 32)).shape == (2, 16)
    assert erpm.stages(net)[-1].fc.out_features == 16


def test_weights_come_from_any_plain_file_and_nothing_else(tmp_path):
    name, x, file = "torchvision:mobilenet_v3_small", images(1, 224), tmp_path / "w.pth"
    net = erpm.build(name, 7)
    state = {k: v for k, v in net.net.state_dict().items() if "num_batches" not in k}
    again = lambda: erpm.build(name, 7, str(file))(x)                               # noqa: E731
    for tree in (state, {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
                 {"model": state, "optimizer": {"lr": 0.1}}, net.state_dict()):
        torch.save(tree, file)
        assert torch.equal(again(), net(x))
    torch.save(state, file, _use_new_zipfile_serialization=False)
    assert torch.equal(again(), net(x)) and erpm.build(name, 7, str(file)).size_px == 224
    for tree, says in (({"args": Path("x"), "model": state}, "nothing is unpickled here"),
                       ({"epoch": 3}, "holds no state dict but epoch"),
                       ({**state, "more": x}, "missing none, unexpected 1 ['more']"),
                       ({k: v for k, v in state.items() if k != "classifier.3.bias"},
                        "missing 1 ['classifier.3.bias']")):
        torch.save(tree, file)
        with pytest.raises(erpm.UserError, match=re.escape(says)) as e:
            again()
        assert len(str(e.value).splitlines()) == 1
    torch.save(state, file)
    with pytest.raises(erpm.UserError, match=r"classifier.3.weight \(7, 1024\) for \(5, 1024\)"):
        erpm.build(name, 5, str(file))


def test_the_weights_of_an_encoder_alone_leave_a_new_classifier(tmp_path):
    file, x = str(tmp_path / "encoder.pth"), images(1, 160)
    encoder = erpm.build("timm:test_vit", 0)
    torch.save(encoder.net.state_dict(), file)
    net = erpm.build("timm:test_vit", 3, file)
    assert erpm.lacks_head(net, file)
    assert torch.equal(erpm.stages(net)[-1].features(erpm.stages(net)[:-1](x)), encoder(x))
    torch.save(net.net.state_dict(), file)
    assert not erpm.lacks_head(net, file)
    with pytest.raises(erpm.UserError, match="unexpected 2 .'head.weight', 'head.bias'"):
        erpm.build("timm:test_vit", 0, file)


@pytest.mark.usefixtures("tiny_clips")
@pytest.mark.filterwarnings("ignore:.*torch.jit|.*Tracer|.*Python boolean")
@pytest.mark.parametrize("kind", ["safetensors", "pt", "archive"])
def test_a_whole_clip_gives_its_visual_tower_strictly(kind, tmp_path):
    from safetensors.torch import save_file
    clip, file = erpm.open_clip_model("tiny-quickgelu"), tmp_path / f"clip.{kind}"
    x = images(2, 32)
    if kind == "safetensors":
        save_file(clip.state_dict(), file)
    elif kind == "pt":
        torch.save({"state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, file)
    else:                                           # the form of OpenAI's files: traced, half
        with torch.no_grad():
            traced = torch.jit.trace(clip, (x[:1] / 255, torch.zeros(1, 8, dtype=torch.long)),
                                     check_trace=False)
        torch.jit.save(traced.half(), file)
        clip = clip.half().float()
    net = erpm.build("open_clip:tiny-quickgelu", 5, str(file))
    assert torch.equal(net.net.visual(net.prepare(x)), clip.encode_image(net.prepare(x)))
    whole = erpm.open_clip_model("tiny-quickgelu", str(file))
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in clip.state_dict().items())
    assert not whole.training and erpm.lacks_head(net, str(file))
    if kind == "archive":
        with pytest.raises(erpm.UserError, match="want QuickGELU: use open_clip:tiny-quickgelu"):
            erpm.open_clip_model("tiny", str(file))
    with pytest.raises(erpm.UserError, match="does not fit open_clip:tiny-avg: missing"):
        erpm.build("open_clip:tiny-avg", 5, str(file))


@pytest.mark.usefixtures("tiny_clips")
def test_an_encoder_alone_is_given_its_classifier_by_pretrain_first(tmp_path):
    torch.save(erpm.open_clip_model("tiny").state_dict(), tmp_path / "clip.pt")
    cfg = erpm.resolve("demo", [f"out={tmp_path}", "model.student=open_clip:tiny",
                                f"model.student_weights={tmp_path / 'clip.pt'}", "pretrain.tune=0",
                                "pretrain.epochs=1", "pretrain.batch=8", "runtime.amp=none"])
    data = erpm.ImageSet("x", np.arange(16) % 5, "abcde", images=images(16, 32))
    path = erpm.student_path(cfg, data)
    assert path == str(cfg.dir / "student.safetensors")
    net, encoder = erpm.build("open_clip:tiny", 5, path), erpm.build("open_clip:tiny", 5, str(
        tmp_path / "clip.pt"))
    assert all(torch.equal(v, encoder.net.visual.transformer.state_dict()[k])
               for k, v in net.net.visual.transformer.state_dict().items())
    cfg = erpm.resolve("demo", [f"model.teacher_weights={tmp_path / 'clip.pt'}",
                                "model.teacher=open_clip:tiny"])
    with pytest.raises(erpm.UserError, match="has no classifier: model.teacher_weights wants"):
        erpm.preflight(cfg, True)


def test_weights_of_a_tag_with_other_classes_come_with_a_new_classifier(monkeypatch):
    import torchvision
    theirs = torchvision.models.mobilenet_v3_small()
    hub = torchvision.models.WeightsEnum
    monkeypatch.setattr(hub, "get_state_dict", lambda *a, **kw: dict(theirs.state_dict()))
    name = "torchvision:mobilenet_v3_small/IMAGENET1K_V1"
    one, five = erpm.build(name), erpm.build(name, 5)
    state = {k: v for k, v in five.net.state_dict().items() if not k.startswith("classifier.3.")}
    assert all(torch.equal(v, one.net.state_dict()[k]) for k, v in theirs.state_dict().items())
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in state.items())
    assert (one.n_classes, five.n_classes) == (1000, 5)

    def offline(*a, **kw):
        raise OSError("no route")
    monkeypatch.setattr(hub, "get_state_dict", offline)
    monkeypatch.setattr("open_clip.factory.download_pretrained", offline)
    for name in (name, "open_clip:ViT-B-32-quickgelu/openai"):
        with pytest.raises(erpm.UserError, match=f"weights of {name} could not be loaded.*PATH"):
            erpm.build(name)


# ---- METRICS, LINEAR PROBES, ANY MODEL ON ANY SET ----

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


def shown(classes, n, project=None):
    return erpm.ImageSet("x", np.arange(n) * 7 % classes, map(str, range(classes)), erpm.View(32),
                         images=images(n), project=project)


def test_figures_of_a_plain_network_are_those_of_a_slow_loop():
    data = shown(9, 60, erpm.Project([[0, 3], 1, 2, 4, 5, 6, 7, 8, [9, 10]]))
    z = (3 * torch.randn(60, 11, generator=erpm.rng("z"))).round() / 2               # many ties
    at = {bytes(x.numpy()): k for k, x in enumerate(data.images)}
    predict = lambda x: z[[at[bytes(i.numpy())] for i in x]]                          # noqa: E731
    got = erpm.evaluate(predict, data, batch=16, amp="none")
    p = data.project(z).softmax(-1)
    assert got == {"n": 60, **slow_figures(p, torch.tensor(data.y))}


@pytest.mark.parametrize("passes, dropout", [(4, 0.3), (0, 0.3), (4, 0.0)])
def test_figures_of_every_rule_are_those_of_a_slow_loop(passes, dropout):
    s, data = student(dropout=dropout), shown(5, 50)
    s.tuned.heads["robust"][-1].fc.bias.data[1] += 0.3
    y, f = torch.tensor(data.y), s.features(data.images / 255)
    s.features = lambda x: type(s).features(s, x / 255)
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
    assert got["kl"] == pytest.approx(erpm.divergence(s.moments(f, passes)[0]).mean(0).tolist(),
                                      abs=1e-5)


def test_a_confidence_on_an_edge_belongs_to_the_lower_bin():
    edges = torch.linspace(0, 1, 16)
    sums = erpm.tally(*torch.zeros(2, 15, 1), edges[1:, None])[0]
    assert sums[4:19].tolist() == [1] * 15 and sums[:4].tolist() == [15, 15, 0, 0]


def test_outputs_that_are_not_finite_are_refused():
    z = torch.zeros(16, 5)
    z[3, 2] = math.nan
    with pytest.raises(erpm.UserError, match="not finite .* for 1 of 16 images"):
        erpm.evaluate(lambda x: z, shown(5, 16))


def test_the_held_out_part_is_a_share_of_every_class():
    y = np.random.default_rng(0).permutation([0] * 40 + [1] * 20 + [2] * 3 + [3])
    out = erpm.held_out(y)
    assert np.bincount(y[out], minlength=4).tolist() == [6, 3, 1, 0]
    assert (erpm.held_out(y) == out).all() and (erpm.held_out(y, 1) != out).any()


def blobs(n=90, d=4, c=3):
    g = erpm.rng("blobs")
    y = torch.arange(n) % c
    x = torch.randn(c, d, generator=g)[y] + torch.randn(n, d, generator=g)
    return x * torch.tensor([1.0, 10, 0.1, 1]) + 5, y


def test_a_linear_probe_is_the_optimum_that_slow_gradient_descent_finds(monkeypatch):
    x, y = blobs()
    weight, bias, l2 = erpm.linear_probe(x, y, 3, l2s=(0.01,))
    u = ((x - x.mean(0)) / x.std(0, correction=0)).double()
    w = torch.zeros(3, 5, dtype=torch.double, requires_grad=True)
    for _ in range(3000):
        loss = F.cross_entropy(u @ w[:, :4].T + w[:, 4], y) + 0.005 * w[:, :4].square().sum()
        w = (w - torch.autograd.grad(loss, w)[0]).detach().requires_grad_()
    slow, ours = (u @ w[:, :4].T + w[:, 4]).softmax(-1), (x @ weight.T + bias).softmax(-1)
    assert l2 == 0.01 and torch.allclose(slow.float(), ours, atol=1e-4)
    monkeypatch.setattr(erpm, "PROBE_LOGITS", 24)                                  # small chunks
    assert torch.allclose(erpm.linear_probe(x, y, 3, l2s=(0.01,))[0], weight, rtol=1e-4)


def test_the_strength_of_a_probe_is_the_best_on_the_held_out_part():
    x, y = blobs()
    x = torch.cat([x, torch.randn(90, 60, generator=erpm.rng("noise"))], 1)
    out = torch.from_numpy(erpm.held_out(y.numpy()))
    losses = {}
    for l2 in erpm.PROBE_L2:
        u = (x - x.mean(0)) / x.std(0, correction=0)
        w, b, _ = erpm.linear_probe(u[~out], y[~out], 3, l2s=(l2,))
        losses[l2] = float(F.cross_entropy(u[out] @ w.T + b, y[out]))
    chosen = erpm.linear_probe(x, y, 3)[2]
    assert losses[chosen] <= min(losses.values()) + 0.02 and 1e-6 < chosen < 10


def test_features_of_each_head_and_its_linear_layer_are_that_head():
    s, x = student(), images(4) / 255
    with torch.no_grad():
        for p in s.tuned.parameters():
            p += 0.05 * torch.rand(p.shape, generator=erpm.rng("p", tuple(p.shape)))
        for name, z in s(x)._asdict().items():
            h = erpm.frozen_features(s, name)(x)
            assert torch.equal(s.tuned.heads[name][-1].fc(h), z)
        net = tiny_net()
        assert torch.equal(net[-1](erpm.frozen_features(s, "original")(x)), net(x))
        assert torch.equal(net[-1](erpm.frozen_features(net)(x)), net(x))


def test_a_network_answers_itself_on_its_own_classes_alone(tmp_path):
    make_tree(tmp_path / "a", erpm.SHAPES[::-1], n=1)           # sorted: other order, other classes
    make_tree(tmp_path / "b", n=1)
    make_tree(tmp_path / "c", n=1, splits=("",))
    cfg = erpm.Config(data=erpm.Data(size_px=32, n_test=4))

    def head(home, name, classes=10, project=None):
        net = erpm.build("cifar:resnet8", classes)
        data = erpm.open_set(name, cfg.data) if name.startswith(("folder", "shapes")) else \
            shown(classes, 4, project)
        return erpm.head_for(erpm.Entry("x", net, "", {}, home), name, data, cfg)

    folder = f"folder:{tmp_path}/"
    for home, name, classes in [("shapes", "shapes-r", 10), ("cifar10", "cifar10-c", 10),
                                ("imagenet", "imagenet-v2", 1000), (folder + "b", folder + "c", 2),
                                (folder + "b", f"folder-c:{tmp_path}/b", 2)]:
        assert head(home, name, classes) == "own", (home, name)
    assert head("imagenet", "imagenet-r", 1000, erpm.Project([0, 1])) == "own"
    for home, name, classes in [("cifar10", "fashion-mnist", 10), ("", "shapes", 10),
                                ("shapes", folder + "a", 10), ("imagenet", "cifar10", 10)]:
        assert head(home, name, classes) == "linear probe (clean)", (home, name)
    with pytest.raises(erpm.UserError, match="has 7 classes and shapes needs 10"):
        head("shapes", "shapes", 7)


def test_all_and_companions_name_the_sets():
    assert erpm.with_companions(["imagenet-a", "imagenet@r", "imagenet-r"]) == [
        "imagenet-a", "imagenet@a", "imagenet@r", "imagenet-r"]
    names = erpm.all_sets("cifar10")
    assert {*erpm.SETS, "cifar10-c"} == set(names)


def test_the_networks_of_the_analysis_exist():
    import open_clip
    import timm
    names = erpm.resolve("analysis", []).eval.models.split(",")
    known = {f"timm:{n}" for n in timm.list_pretrained()} | {
        f"open_clip:{n}/{tag}" for n, tag in open_clip.list_pretrained()}
    assert len(names) == 18 and {n.removeprefix("probe:") for n in names} <= known


TIMING = ("seconds", "images_per_s", "processes")


def untimed(run):
    return [{k: v for k, v in r.items() if k not in TIMING} for r in result_rows(run)]


@pytest.fixture(scope="module")
def three_networks(tmp_path_factory):
    """A Student and a plain network of shapes, and a file of unknown origin; a set of four classes
    and one of two images; what one process makes of them."""
    cwd, net = tmp_path_factory.mktemp("any"), erpm.build("cifar:resnet8-s2", 10)
    key = {"key": {"data": {"name": "shapes"}}}
    s = erpm.Student(net, 2, 1, 0.2)
    erpm.save_weights(cwd / "s/model.safetensors", s, erpm.describe(s, **key))
    erpm.save_weights(cwd / "p/model.safetensors", net, erpm.describe(net, **key))
    erpm.save_weights(cwd / "foreign.safetensors", net.net, {})
    make_tree(cwd / "four", "abcd", n=6)
    make_tree(cwd / "two", n=1)
    words = ["eval", "--model", "run:s,run:p,cifar:resnet8-s2=foreign.safetensors", "--set",
             "shapes,shapes-r,folder:four,folder:two", "data.n_test=50", "data.n_train=100",
             "eval.batch=16", "eval.passes=2", "data.size_px=32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        torch.set_num_threads(1)
        assert erpm.main([*words, "out=one"]) == 0
    return cwd, words


def test_a_set_of_other_classes_is_probed(three_networks):
    rows = untimed(three_networks[0] / "one/models")
    heads = {(r["label"], r["set"]): r["head"] for r in rows}
    assert len(rows) == len(heads) == 12
    for (label, name), head in heads.items():
        own = name.startswith("shapes") and label.startswith("run:")
        assert head == ("own" if own else "linear probe (clean)")
    probe = next(r for r in rows if (r["label"], r["set"]) == ("run:s", "folder:four"))
    assert "rules" not in probe and probe["probe"].startswith("folder:four, 24 images, ")
    assert probe["trained_on"] == "shapes" and probe["passes"] is None and probe["n"] == 24


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
    assert erpm.main([*words, "out=half"]) == 0
    assert untimed(cwd / "half/models") == untimed(cwd / "one/models") and len(calls) == 13
    monkeypatch.setattr(erpm, "linear_probe", None)         # neither is a probe fitted again
    assert erpm.main([*words, "out=half"]) == 0 and len(calls) == 13
    (cwd / "half/models/probes").rename(cwd / "probes")
    assert erpm.main([*words, "out=half"]) == 0 and len(calls) == 13


def test_a_probe_is_kept_and_other_settings_make_new_rows(three_networks, monkeypatch):
    cwd, words = three_networks
    monkeypatch.chdir(cwd)
    one = ["eval", "--model", "run:p", "--set", "folder:four", "eval.batch=16"]
    monkeypatch.setattr(erpm, "linear_probe", lambda *a, **kw: pytest.fail("fitted again"))
    (cwd / "kept/models").mkdir(parents=True)
    (cwd / "kept/models/probes").symlink_to(
        cwd / ("probes" if (cwd / "probes").is_dir() else "one/models/probes"))
    assert erpm.main([*one, "out=kept", "data.size_px=32"]) == 0
    monkeypatch.undo()
    monkeypatch.chdir(cwd)
    for size, code, n in (33, None, 2), (32, None, 2), (32, {"erpm": "other"}, 3):
        monkeypatch.setattr(erpm, "versions", erpm.versions if code is None else lambda: code)
        assert erpm.main([*one, "out=kept", f"data.size_px={size}"]) == 0
        assert len(result_rows(cwd / "kept/models")) == n


def test_all_scores_what_is_there_and_refuses_what_is_half_there(
        three_networks, tmp_path, monkeypatch, capsys):
    cwd, _ = three_networks
    monkeypatch.chdir(tmp_path)
    words = ["eval", "--model", f"cifar:resnet8-s2={cwd}/foreign.safetensors", "--set", "all",
             "data.n_test=10", "data.n_train=100"]
    assert erpm.main(words) == 0
    out = capsys.readouterr().out
    assert [r["set"] for r in result_rows("runs/models")] == ["shapes", "shapes-r"]
    assert re.search(r"^left out, not found .*fashion-mnist.*imagenet-a.*imagenet-c", out, re.M)
    make_tree(tmp_path / "data/imagenet-a", erpm.synsets("a")[:2], n=1, splits=("",))
    assert "2 images in data/imagenet-a, expected 7,500" in fails(capsys, *words)


def test_all_passes_over_what_a_network_cannot_do_and_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net = erpm.build("timm:regnetx_002", 1000)                         # it cannot be cut
    erpm.save_weights(tmp_path / "w.safetensors", net.net, {})
    name = "mine@timm:regnetx_002=w.safetensors"
    assert erpm.main(["eval", "--model", name, "--set", "all"]) == 0
    out = capsys.readouterr().out
    assert "left out, mine cannot be cut for a linear probe: shapes, shapes-r" in out
    assert "left out, not found (see `python erpm.py sets`): fashion-mnist, cifar10" in out
    assert "regnet.RegNet cannot be cut" in fails(
        capsys, "eval", "--model", name, "--set", "shapes")


def test_a_probe_of_another_seed_is_another_row(three_networks, tmp_path, monkeypatch):
    cwd, _ = three_networks
    monkeypatch.chdir(tmp_path)
    words = ["eval", "--model", f"probe:cifar:resnet8-s2={cwd}/foreign.safetensors", "--set",
             "shapes", "data.n_test=10", "data.n_train=100"]
    for seed in (0, 1, 1):
        assert erpm.main([*words, f"seed={seed}"]) == 0
    assert [(r["seed"], r["head"]) for r in result_rows("runs/models")] == [
        (0, "linear probe (clean)"), (1, "linear probe (clean)")]


def test_weights_that_cannot_be_had_stop_the_loop_and_lose_nothing(
        three_networks, monkeypatch, capsys):
    cwd, _ = three_networks
    monkeypatch.chdir(cwd)

    def offline(*a, **kw):
        raise OSError("no network")

    import timm
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kw: offline()
                        if pretrained else create(name, pretrained, **kw))
    line = fails(capsys, "eval", "--model", "run:p,timm:resnet18.tv_in1k,run:s", "--set", "shapes",
                 "out=lost", "data.n_test=10")
    assert "timm:resnet18.tv_in1k: the weights of" in line and "--model run:p,run:s" in line
    assert [r["label"] for r in result_rows("lost/models")] == ["run:p"]


# ---- ZERO-SHOT ----

def text_head(c=4, d=64, seed=0, bias=0.0):
    return erpm.TextHead(torch.randn(c, d, generator=erpm.rng("text", seed)), math.log(8.0), bias)


def two_small_towers(c=4):
    """A visual tower of three stages and a projection to 64 dimensions, with a text head."""
    net = tiny_net(64)
    for p in net[-1].parameters():
        p.requires_grad_(False).mul_(4)                      # embeddings that differ between images
    return erpm.Tower(net, text_head(c)).eval()


def floats(n=6, size=16):
    return torch.randn(n, 3, size, size, generator=erpm.rng("floats"))


def test_a_text_head_is_the_scaled_cosine_and_trains_nothing():
    head, h = text_head(bias=-2.0), torch.randn(3, 64)
    want = [[8 * float(F.cosine_similarity(a, w, 0)) - 2 for w in head.weight] for a in h]
    assert torch.allclose(head(h), torch.tensor(want), atol=1e-5)
    assert not list(head.parameters()) and head.out_features == 4
    c = torch.randn(3, 4)                                    # sum_j c_j dz_j/dh by autograd
    slow = torch.stack([torch.autograd.functional.vjp(head, a[None], k[None])[1][0]
                        for a, k in zip(h, c)])
    assert torch.allclose(head.pull(h, c @ head.weight), slow, atol=1e-5)


def test_the_closed_form_of_a_text_head_is_the_limit_of_many_passes():
    s, x = erpm.Student(two_small_towers(), 2, 1, 0.02, dropout_in="head").eval(), floats()
    f = s.features(x)
    mean, sigma, z = s.moments(f, 20000)
    mean0, sigma0, z0 = s.moments(f, 0)
    assert torch.allclose(sigma, sigma0, rtol=0.05) and torch.allclose(mean, mean0, atol=5e-3)
    assert torch.allclose(z, z0, atol=0.05) and sigma.min() > 0
    part = erpm.Project([2, [0, 3]])                         # a set that scores some of the classes
    assert torch.allclose(s.moments(f, 20000, part)[1], s.moments(f, 0, part)[1], rtol=0.05)


def test_the_three_heads_tune_a_projection_each_and_share_the_text():
    net = two_small_towers()
    s, x = erpm.Student(net, 2, 1, 0.1).eval(), floats()
    assert all(torch.equal(z, net(x)) for z in s(x))
    classifiers = [s.tuned.heads[h][-1] for h in erpm.HEADS]
    assert all(torch.equal(c.fc.weight, net.fc.weight) for c in classifiers)
    assert len({id(p) for c in classifiers for p in c.features.parameters()}) == 6
    own = erpm.Student(erpm.Tower(net.visual, erpm.Embedding(64)), 2, 1, text=net.fc).eval()
    assert torch.equal(own(x).robust, net(x))
    with pytest.raises(erpm.UserError, match="embeddings"):
        erpm.Student(erpm.Tower(net.visual, erpm.Embedding(64)), 2, 1)


def test_new_classes_share_every_weight():
    s, x = erpm.Student(two_small_towers(), 2, 1, 0.1).eval(), floats()
    new = torch.cat([s.original[-1].fc.weight[[2, 0]], torch.randn(3, 64)])
    other = erpm.with_text(s, new)
    assert other.n_classes == 5 and s.n_classes == 4
    assert {id(p) for p in other.parameters()} == {id(p) for p in s.parameters()}
    for a, b in zip(other(x), s(x)):
        assert a.shape == (6, 5) and torch.allclose(a[:, :2], b[:, [2, 0]], atol=1e-6)


WORDED_CLIPS = {                                # with OpenAI's whole vocabulary, for its tokenizer
    "vit": {"embed_dim": 16, "quick_gelu": True, "vision_cfg": TINY_VIT},
    "rn": {"embed_dim": 16, "vision_cfg": TINY_CLIPS["tiny-rn"]["vision_cfg"]},
    "custom": {"custom_text": True, "init_logit_bias": -10, **TINY_CLIPS["tiny-timm"]},
}


@pytest.mark.parametrize("kind", WORDED_CLIPS)
def test_zero_shot_logits_equal_open_clips_own_path(kind, tmp_path):
    import open_clip
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / f"worded-{kind}.json").write_text(json.dumps(WORDED_CLIPS[kind] | {
        "text_cfg": text}))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    clip = open_clip.create_model(f"worded-{kind}").eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    names, templates = ["star", "half disc", "ring"], open_clip.OPENAI_IMAGENET_TEMPLATES[:5]
    weight = open_clip.build_zero_shot_classifier(
        clip, open_clip.get_tokenizer(f"worded-{kind}"), names, templates)
    net = erpm.build(f"open_clip:worded-{kind}", erpm.Prompts(
        names, [t("{}") for t in templates]), str(tmp_path / "clip.pt"))
    x = images(3, WORDED_CLIPS[kind]["vision_cfg"]["image_size"])
    with torch.no_grad():
        want = clip.logit_scale.exp() * clip.encode_image(net.prepare(x), normalize=True) @ weight
        want = want if clip.logit_bias is None else want + clip.logit_bias
        assert torch.allclose(net(x), want, rtol=0, atol=2e-6) and want.std() > 1e-3
        own = erpm.Student(net, 1, 1).eval()(x).clean    # other memory: kernels may round otherwise
        assert torch.allclose(own, net(x), rtol=0, atol=2e-6)


def test_prompts_are_normalised_averaged_and_normalised_again():
    def encode(texts):
        return torch.stack([torch.randn(5, generator=erpm.rng(t)) * len(t) for t in texts])

    prompts = erpm.Prompts(["cat", "dog{}", "owl"], ["a {}.", "my {} here"])
    for name, row in zip(prompts.classes, erpm.text_weights(encode, prompts, chunk=2)):
        each = [encode([t])[0] for t in (f"a {name}.", f"my {name} here")]
        mean = sum(e / e.norm() for e in each) / 2
        assert torch.allclose(row, mean / mean.norm(), atol=1e-6)


def test_prompts_come_from_imagenet_the_folder_names_or_a_file(tmp_path):
    import open_clip
    some = erpm.ImageSet("x", [0, 1], ["n01443537", "n01440764"], images=images(2))
    p = erpm.prompts_of(some)
    assert p.classes == ("goldfish", "tench") and len(p.templates) == 80
    assert p.templates[3] == open_clip.OPENAI_IMAGENET_TEMPLATES[3]("{}")
    part = erpm.ImageSet("y", [0, 1], some.classes, images=images(2), project=erpm.Project([1, 0]))
    assert list(erpm.prompts_of(part).classes) == list(open_clip.IMAGENET_CLASSNAMES)
    own = erpm.ImageSet("z", [0, 1], ["polar_bear", "half-disc"], images=images(2))
    assert erpm.prompts_of(own) == erpm.Prompts(("polar bear", "half disc"))
    (tmp_path / "names.txt").write_text("\n".join(f"thing_{i}" for i in range(10)) + "\n")
    (tmp_path / "templates.txt").write_text("one {}\n\ntwo {}\n")
    named = erpm.open_set("shapes@unseen", erpm.Data(
        n_test=8, classes="circle, star", names=str(tmp_path / "names.txt")))
    p = erpm.prompts_of(named, str(tmp_path / "templates.txt"))
    assert p.templates == ("one {}", "two {}") and p.classes[:2] == ("thing_1", "thing_2")
    with pytest.raises(erpm.UserError, match="one {}"):
        erpm.Prompts(["a", "b"], ["no place"])


def test_captions_name_what_the_picture_shows_and_change_no_pixel():
    n, u = 40, erpm.uniforms(erpm.fold("shapes", "train", ""), np.arange(40), 128)
    lines = erpm.caption_shapes(n, "train")
    assert lines[:7] == erpm.caption_shapes(7, "train") != erpm.caption_shapes(7, "test")
    colours, textures = list(erpm.NAMED_COLOURS), list(erpm.TEXTURES)
    for i, line in enumerate(lines):
        words = line.rstrip(".").removeprefix("a photo of a ")
        assert words.endswith(erpm.SHAPES[i % 10])
        named = words.removesuffix(erpm.SHAPES[i % 10]).split()
        assert named[-1:] in ([], [textures[int(u[i, 39] * 4)]]) and len(named) <= 2
        if len(named) == 2:
            fore, back = u[i, 5:8], u[i, 8:11]
            fore = (back + 0.5) % 1 if np.linalg.norm(fore - back) < 0.5 else fore
            shown = 0.8 * fore + 0.2 * u[i, 41:44]
            assert named[0] == min(colours, key=lambda c: float(np.linalg.norm(
                shown - np.array(erpm.NAMED_COLOURS[c]))))
    assert {len(w.split()) for w in lines} >= {5, 6, 7}
    vocabulary = {w for line in lines for w in re.findall(r"\w+", line)}
    assert len({int(erpm.word_ids([w])[0, 0]) for w in vocabulary}) == len(vocabulary)


def test_seen_and_unseen_classes_part_the_set():
    data = erpm.Data(classes="6", n_test=50)
    seen, rest = (erpm.open_set(f"shapes-c@{side}", data) for side in ("seen", "unseen"))
    assert seen.classes + rest.classes == list(erpm.SHAPES)
    whole = erpm.open_set("shapes", erpm.Data(n_test=50))
    assert sorted([*seen.index, *rest.index]) == whole.index.tolist()
    for part in (seen, rest):
        x, y, index = part.__getitems__([(0, p) for p in range(len(part))])
        assert torch.equal(x, whole.images[index])
        assert [part.classes[k] for k in y] == [whole.classes[k] for k in whole.y[index]]
    assert erpm.base_name("shapes-c@unseen") == ("shapes@unseen", True)
    for classes, says in (("9", "leave two"), ("cirle,star", "did you mean 'circle'")):
        with pytest.raises(erpm.UserError, match=says):
            erpm.open_set("shapes@unseen", erpm.Data(classes=classes, n_test=50))


def test_contrastive_loss_is_clips_where_captions_are_distinct():
    z, distinct = torch.randn(5, 5), torch.eye(5, dtype=torch.bool)
    pair = torch.tensor([3, 0, 1, 4, 2])
    want = (F.cross_entropy(z, pair) + F.cross_entropy(z.T, pair.argsort())) / 2
    assert torch.allclose(erpm.contrastive_loss(z, pair, distinct), want)


def test_a_caption_that_says_less_is_true_and_one_that_says_more_may_be():
    entails = erpm.entailment(erpm.word_ids(["a star", "a red star", "a ring"]))
    assert entails.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    z = torch.randn(2, 3, dtype=torch.double)                # images of "a red star" and "a ring"
    lse = lambda *v: torch.stack(v).logsumexp(0)                               # noqa: E731
    both = [(0, 0, [z[0, 2]], [z[1, 0]]), (0, 1, [z[0, 2]], [z[1, 1]]),
            (1, 2, [z[1, 0], z[1, 1]], [z[0, 2]])]
    want = sum(lse(z[i, k], *row) - z[i, k] + lse(z[i, k], *col) - z[i, k]
               for i, k, row, col in both) / 6
    assert torch.allclose(erpm.contrastive_loss(z, torch.tensor([1, 2]), entails), want)
    alone = z[:, :1].clone().requires_grad_()                # nothing to tell apart: no loss or NaN
    loss = erpm.contrastive_loss(alone, torch.zeros(2, dtype=torch.long), entails[:1, :1])
    loss.backward()
    assert loss == 0 and not alone.grad.any()


def test_student_and_teacher_see_the_same_augmented_pixels():
    seen = {}

    class Eye(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            seen[self.name] = x
            return x

    def net(name, size, mean):
        body = nn.Sequential(Eye(name), *tiny_net())
        return erpm.Net(body, name=name, n_classes=5, size_px=size, mean=(mean,) * 3).eval()

    s, teacher = erpm.Student(net("student", 32, 0.5), 1, 1), net("teacher", 48, 0.2)
    raw = {}
    for m in (s.backbone, teacher):
        m.register_forward_pre_hook(lambda m, a: raw.setdefault(m, a[0]))
    x, y = images(6), torch.arange(6) % 5
    step = erpm.erpm_step(s, teacher, erpm.Distill(), erpm.Robustify(augment="augmix"))
    step(s.tuned, erpm.Batch(x, y, erpm.rng(0)))
    assert torch.equal(raw[s.backbone][6:], raw[teacher]) and raw[teacher].dtype == torch.uint8
    assert not torch.equal(raw[teacher], x) and torch.equal(raw[s.backbone][:6], x)
    grown = F.interpolate(raw[teacher] / 255, (48, 48), mode="bicubic", antialias=True)
    assert torch.allclose(seen["teacher"], (grown - 0.2) / 0.25, atol=1e-5)
    assert torch.allclose(seen["student"][6:], (raw[teacher] / 255 - 0.5) / 0.25, atol=1e-5)


def test_the_anchor_is_nothing_where_nothing_moved():
    z0 = torch.randn(3, 7)
    same = erpm.Heads(z0, torch.cat([z0, z0]), z0)
    assert abs(float(erpm.anchor_loss(same, z0, 2.0))) < 1e-6
    moved = same._replace(robust=z0 + torch.randn(3, 7))
    p, q = ((v / 2).softmax(-1) for v in (z0, moved.robust))
    want = 4 * (p * (p / q).log()).sum() / 3
    assert torch.allclose(erpm.anchor_loss(moved, z0, 2.0), want, atol=1e-5)


CLIP = """\
--recipe demo-clip run=z model.student=clip-tiny:resnet8-s2 model.teacher=cifar:resnet8-s2
distill.tune=1 distill.head=1 data.n_train=300 data.n_test=40 pretrain.batch=50 robustify.batch=50
distill.batch=50 pretrain.epochs=1 robustify.epochs=1 distill.epochs=1 eval.batch=40 eval.passes=2
eval.sets=shapes@seen,shapes@unseen""".split()


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("clip")
    with contextlib.chdir(cwd), contextlib.redirect_stdout(io.StringIO()) as out:
        assert erpm.main(["demo", *CLIP]) == 0
    return cwd, out.getvalue()


def test_demo_clip_scores_original_and_student_on_seen_and_unseen_classes(clip_run, monkeypatch):
    cwd, out = clip_run
    rows = {(r["label"], r["set"]): r for r in result_rows(cwd / "runs/z")}
    assert set(rows) == {("teacher", "shapes@seen")} | {
        (label, s) for label in ("original", "ERPM") for s in ("shapes@seen", "shapes@unseen")}
    assert {r["head"] for k, r in rows.items() if k[0] != "teacher"} == {"zero-shot"}
    n = sum(p.numel() for p in erpm.load(cwd / "runs/z").tuned.parameters())
    assert re.search(rf"^distill: .* {n:,} trained parameters \({16e-6 * n:.1f} MB with gradients "
                     "and optimizer state", out, re.M)
    monkeypatch.chdir(cwd)
    assert erpm.main(["eval", "--run", "runs/z"]) == 0
    assert len(result_rows("runs/z")) == len(rows)


def test_the_frozen_towers_are_equal_bit_for_bit_after_training(clip_run):
    run = clip_run[0] / "runs/z"
    first, s = erpm.load(run / "student.safetensors"), erpm.load(run)
    before, _ = erpm.cut(first, 1)
    after = s.backbone.state_dict()
    assert len(after) > 20 and all(torch.equal(v, after[k]) for k, v in before.state_dict().items())
    x = images(4)
    seen = erpm.zero_shot(first, erpm.open_set("shapes@seen", erpm.Data(classes="6", n_test=4)))
    assert torch.equal(s.original(s.features(x)), seen(x))
    assert torch.equal(s.original[-1].fc.weight, s.tuned.heads["robust"][-1].fc.weight)
    assert not torch.equal(s(x).clean, seen(x))              # and the tuned part has moved


def test_a_student_names_new_classes_with_its_own_text_tower(clip_run, tmp_path, monkeypatch):
    run = clip_run[0] / "runs/z"
    for name in ("model", "student"):                        # a run's folder may be moved
        shutil.copy(run / f"{name}.safetensors", tmp_path)
    s, towers = erpm.load(tmp_path), erpm.two_towers(
        "clip-tiny:resnet8-s2", str(run / "student.safetensors"))
    new = erpm.ImageSet("new", [0, 1], ["red_ring", "blue-arrow"], images=images(2))
    monkeypatch.setattr(erpm, "pick_device", lambda: torch.device("cpu"))
    there = erpm.zero_shot(s, new, cache=tmp_path / "text")
    texts = ["a photo of a red ring.", "a photo of a blue arrow."]
    want = F.normalize(towers.encode(texts), dim=-1)
    assert torch.allclose(there.original[-1].fc.weight, want, atol=1e-6)
    (tmp_path / "student.safetensors").unlink()              # the text tower runs once
    again = erpm.zero_shot(s, new, cache=tmp_path / "text")
    assert torch.equal(again(images(2)).robust, there(images(2)).robust)
    with pytest.raises(erpm.UserError, match="text tower"):
        erpm.zero_shot(s, new)


def test_other_prompts_and_only_they_make_new_rows(clip_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("a drawing of the {}\n")
    model = f"clip-tiny:resnet8-s2={clip_run[0] / 'runs/z/student.safetensors'}"
    for sets, words, n in (("shapes,shapes-r", [], 2), ("shapes-r,shapes", [], 2),
                           ("shapes", ["model.templates=t.txt"], 3), ("shapes", [], 3)):
        assert erpm.main(["eval", "--model", model, "--set", sets, "data.n_test=10", *words]) == 0
        rows = result_rows("runs/models")
        assert len(rows) == n and {r["head"] for r in rows} == {"zero-shot"}
    assert len({r["weights"] for r in rows}) == 1 and len({r["prompts"] for r in rows}) == 2


def test_the_visual_tower_alone_takes_a_linear_head(clip_run):
    file = str(clip_run[0] / "runs/z/student.safetensors")
    net = erpm.build("clip-tiny:resnet8-s2", 3, file)
    tower = erpm.build("clip-tiny:resnet8-s2", None, file)
    h, x = tower(images(4)), images(4)
    assert torch.equal(net(x), net.net.fc(h)) and h.shape == (4, 64)
    assert torch.equal(h, erpm.two_towers("clip-tiny:resnet8-s2", file).visual(x))


@pytest.mark.parametrize("words, says", [
    (["distill", "model.head=text"], "has no text tower"),
    (["distill", "model.head=prompt"], "known: linear, text"),
    (["pretrain", "--recipe", "demo-clip", "model.student=open_clip:ViT-B-32-quickgelu"],
     "cannot be pretrained"),
    (["distill", "--recipe", "demo-clip", "data.classes=1"], "leave two"),
    (["distill", "--recipe", "demo-clip", "model.templates=absent.txt"], "cannot read absent.txt"),
])
def test_a_mistake_with_prompts_is_one_line(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, *words, "data.n_train=200", "pretrain.epochs=0.1",
                         "pretrain.batch=20", "robustify.batch=20", "robustify.epochs=0.1",
                         *([] if "open_clip" in words[-1] else ["model.teacher=cifar:resnet8-s2"]))
