"""Tests of erpm.py: CPU, no network, tiny synthetic data.  A test's name is the law that it checks."""
import ast
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml
from PIL import Image

import erpm

HERE = Path(__file__).parent
SOURCE = (HERE / "erpm.py").read_text()
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
TINY = """model.student=cifar:resnet8-s2 model.teacher=cifar:resnet8-s2 distill.tune=2 distill.head=1
data.n_test=60 data.n_train=600 pretrain.n_images=0 robustify.n_images=0 distill.n_images=0
pretrain.batch=50 pretrain.epochs=2 robustify.batch=50 robustify.epochs=1 distill.batch=50
distill.epochs=2 eval.batch=32 eval.passes=3 runtime.log_every=2 runtime.save_every=3""".split()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def command(*words, cwd, launcher=(), **kw):
    """Runs erpm.py as a user does; launcher: words between the interpreter and the file."""
    return subprocess.run([sys.executable, *launcher, str(HERE / "erpm.py"), *map(str, words)], cwd=cwd,
                          env=ENV, capture_output=True, text=True, timeout=300, **kw)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def tiny_net(classes=5, width=8):
    torch.manual_seed(0)
    block = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())  # noqa
    net = nn.Sequential(block(3, width), block(width, width), block(width, width),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    return net.eval()


def images(n=16, size=32, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), generator=erpm.rng("test", seed)).to(torch.uint8)


def result_rows(run):
    return [json.loads(line) for line in (Path(run) / "results.jsonl").read_text().splitlines()]


def counts(run):
    keep = ("label", "weights", "set", "corruption", "severity", "n", "correct", "rules", "sigma", "kl")
    return [{k: r.get(k) for k in keep} for r in result_rows(run)]


# ==== the file itself ====

TREE = ast.parse(SOURCE)
TOP = {n.name: n for n in TREE.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def test_sections_are_those_of_the_docstring():
    banners = re.findall(r"^# ==== (\d+\. [A-Z]+) ====$", SOURCE, re.M)
    listed = re.findall(r"^    (\d+\. [A-Z]+)$", ast.get_docstring(TREE, clean=False), re.M)
    assert banners == listed and len(banners) == 11


def test_nothing_is_used_before_it_is_defined():
    for name, node in TOP.items():
        hints = {id(x) for n in ast.walk(node) for a in (getattr(n, "annotation", None), getattr(n, "returns", None))
                 if a for x in ast.walk(a)}
        names = [x for x in ast.walk(node) if isinstance(x, ast.Name) and id(x) not in hints]
        local = {x.id for x in names if isinstance(x.ctx, ast.Store)} | {
            a.arg for a in ast.walk(node) if isinstance(a, ast.arg)}
        later = {x.id for x in names if x.id in TOP and TOP[x.id].lineno > node.end_lineno} - local
        assert not later, f"{name} uses {later} that stand below"


def test_no_function_is_long_and_no_line_is_wide():
    functions = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef)]
    assert max(n.end_lineno - n.lineno + 1 for n in functions) <= 80
    assert max(len(line) for line in (SOURCE + Path(__file__).read_text()).splitlines()) <= 110


def test_every_public_name_has_a_docstring():
    assert [n for n, node in TOP.items() if not n.startswith("_") and not ast.get_docstring(node)] == []


def test_import_has_no_side_effect_and_loads_no_slow_package(tmp_path):
    code = ("import torch, os, sys; before = torch.random.get_rng_state(), dict(os.environ), os.listdir()\n"
            f"sys.path.insert(0, {str(HERE)!r}); sys.argv = ['x', '--bad']; import erpm\n"
            "assert torch.equal(before[0], torch.random.get_rng_state())\n"
            "assert before[1:] == (dict(os.environ), os.listdir())\n"
            "assert not {'timm', 'open_clip', 'matplotlib'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_recipe_of_config_yaml_loads():
    recipes = erpm.read_yaml(HERE / "config.yaml")
    assert {"demo", "imagenet-rn101", "imagenet-clip-l14"} <= set(recipes)
    for name in recipes:
        assert erpm.resolve(name, []).run == name


def test_every_command_of_the_readme_parses():
    lines = re.findall(r"^(?:torchrun.* |python )erpm\.py (.*?)(?:  +#.*)?$", (HERE / "README.md").read_text(), re.M)
    assert len(lines) >= 8
    for line in lines:
        args = erpm.parse(line.split())
        erpm.resolve(args.recipe, [w.replace("...", "x") for w in args.words])


# ==== basics and config ====

def test_seeds_are_functions_of_the_key():
    assert erpm.fold(1, "a") == erpm.fold(1, "a") != erpm.fold(1, "b")
    u = erpm.uniforms(3, np.arange(5000), 4)
    assert np.array_equal(u[7:9], erpm.uniforms(3, np.array([7, 8]), 4))
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.01 and abs(u.std() - 12 ** -0.5) < 0.01


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
    assert s.y.tolist() == [5, 6, 7] and [erpm.synsets()[p] for p in s.project] == list(names)
    z = torch.zeros(1000)
    z[s.project[6]], z[0 if 0 not in s.project else 4] = 1.0, 2.0   # a class outside the 200 is louder
    assert erpm.evaluate(lambda x: z.expand(len(x), -1), s)["correct"] == 1


def test_imagenet_v2_takes_the_label_from_the_folder_number(tmp_path):
    make_tree(tmp_path / "imagenetv2-matched-frequency-format-val", ("0", "10", "2"), n=1, splits=("",))
    s = erpm.open_set("imagenet-v2", erpm.Data(root=str(tmp_path), allow_partial=True))
    assert sorted(s.y.tolist()) == [0, 2, 10]


# ==== models ====

VITS = ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_medium_patch16_reg4_gap_256",
        "vit_small_patch32_224"]
RESNETS = ["resnet18", "resnet50", "seresnext26d_32x4d", "resnetrs50"]


@pytest.mark.parametrize("name", VITS + RESNETS)
def test_stages_equal_the_network_exactly(name):
    torch.manual_seed(0)
    net = erpm.build(f"timm:{name}")
    size = net.net.default_cfg["input_size"][-1] if name in VITS else 64
    parts = erpm.stages(net)
    with torch.no_grad():
        assert torch.equal(parts(images(2, size)), net(images(2, size)))
    ours, theirs = ({id(p) for p in m.parameters()} for m in (parts, net))
    assert len(parts) >= 8 and ours == theirs


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
    torch.save(net.state_dict(), tmp_path / "b.pth")
    with pytest.raises(erpm.UserError, match="is not a .safetensors file"):
        erpm.build("cifar:resnet8", weights=str(tmp_path / "b.pth"))


def test_a_network_normalises_and_resizes_for_itself():
    net = erpm.Net(nn.Identity(), name="x", n_classes=1, mean=(.5, .4, .3), std=(.2, .2, .1), size_px=48)
    x = images(2, 32)
    assert net(x).shape[-1] == 48 and torch.equal(net(x), net(x.float() / 255))
    net.size_px = 0
    want = (x.float() / 255 - torch.tensor([.5, .4, .3]).view(3, 1, 1)) / torch.tensor([.2, .2, .1]).view(3, 1, 1)
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
    grads = {name: torch.autograd.grad(h.sum(), s.tuned.heads[name][-1].fc.weight, retain_graph=True)[0]
             for name, h in z._asdict().items()}
    assert all(g.abs().sum() > 0 for g in grads.values())
    assert torch.allclose(z.clean, s.tuned(f[:2]).clean) and torch.allclose(z.robust, s.tuned(f[2:]).robust)


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
    stats = {k: v.clone() for k, v in s.tuned.state_dict().items() if "running" in k or "num_b" in k}
    before = s.tuned.heads["clean"][-1].fc.weight.clone()
    data = erpm.ImageSet("x", np.arange(32) % 5, "abcde", 32, images=images(32))
    step = erpm.erpm_step(s, tiny_net_on_uint8(), erpm.Distill(), erpm.Robustify())
    s.backbone.insert(0, Scale())
    erpm.fit(s.tuned, step, data, erpm.Train(epochs=2, batch=16), erpm.Runtime(amp="none"), out=tmp_path,
             name="t", seed=0, key={})
    assert not torch.equal(before, s.tuned.heads["clean"][-1].fc.weight)
    after = {k.replace("backbone.0", "backbone"): v for k, v in s.state_dict().items()}
    s.backbone.pop(0)
    assert all(torch.equal(v, s.state_dict()[k]) for k, v in frozen.items()) and after
    assert all(torch.equal(v, s.tuned.state_dict()[k]) for k, v in stats.items())


class Scale(nn.Module):
    def forward(self, x):
        return x.float() / 255


def tiny_net_on_uint8():
    return nn.Sequential(Scale(), tiny_net()).requires_grad_(False)


def test_head_loss_is_the_formula_worked_by_hand():
    z, zt, y, a, t = np.array([[1., 2, 0], [0, 1, 1]]), np.array([[0., 3, 1], [2, 0, 1]]), [1, 0], 0.3, 2.0
    soft = lambda v: np.exp(v) / np.exp(v).sum(-1, keepdims=True)              # noqa: E731
    ce = -np.log(soft(z)[[0, 1], y]).mean()
    p, q = soft(zt / t), soft(z / t)
    want = (1 - a) * ce + a * t * t * (p * np.log(p / q)).sum(-1).mean()
    got = erpm.head_loss(torch.tensor(z), torch.tensor(zt), torch.tensor(y), a, t)
    assert math.isclose(float(got), want, rel_tol=1e-5)


def test_the_losses_are_those_of_equations_3_and_4():
    g = erpm.rng("loss")
    draw = lambda n: torch.randn(n, 5, generator=g)                            # noqa: E731
    z, z0, zt, y = erpm.Heads(draw(4), draw(8), draw(4)), draw(4), draw(4), torch.tensor([0, 1, 2, 3])
    parts = erpm.erpm_loss(z, z0, zt, y, alpha=0.4, t=3.0)
    one = lambda h, teacher: erpm.head_loss(h, teacher, y, 0.4, 3.0)           # noqa: E731
    clean = one(z.clean, z0) + one(z.combined[:4], z0)
    robust = one(z.robust, zt) + one(z.combined[4:], zt)
    assert torch.isclose(sum(parts.values()), clean + robust)
    assert erpm.erpm_loss(z, z0, z0, y, alpha=0.4, t=3.0)["robust"] != parts["robust"]


def test_batched_passes_equal_one_pass_after_another():
    s, x, t = student(), torch.rand(3, 3, 32, 32), 7
    f = s.features(x)
    with torch.no_grad(), s._sampling(t, 3):
        batched = s.tuned(f)
    masks = [m.masks for m in s.tuned.modules() if isinstance(m, erpm.Dropout)]
    for i in range(t):
        drops = [m for m in s.tuned.modules() if isinstance(m, erpm.Dropout)]
        with torch.no_grad(), s._sampling(1, 3):
            for d, m in zip(drops, masks):
                d.masks = m[i:i + 1]
            alone = s.tuned(f)
        for a, b in zip(alone, batched):
            assert torch.allclose(a, b[3 * i:3 * i + 3], atol=1e-6)


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
    want = [[(mean[b, h] * (mean[b, h] / mean[b, 1]).log()).sum() for h in (0, 2)] for b in range(4)]
    assert torch.allclose(erpm.divergence(mean), torch.tensor(want), atol=1e-6)


def test_each_rule_picks_the_head_worked_by_hand():
    mean = torch.tensor([[[.8, .1, .1], [.7, .2, .1], [.4, .5, .1]],      # clean sits near combined
                         [[.9, .05, .05], [.1, .8, .1], [.1, .85, .05]]])  # robust does
    sigma = torch.tensor([[.1, .2], [.1, .2]])
    pick = lambda rule, **kw: erpm.select(mean, sigma, rule, **kw).tolist()    # noqa: E731
    assert pick("kl") == [0, 2] and pick("sigma") == [0, 0] and pick("product") == [0, 2]
    assert pick("sum") == [0, 2] and pick("soft") == [0, 2]
    assert pick("max-prob") == [0, 0] and pick("entropy") == [0, 0]
    assert pick("max-logit", logits=torch.tensor([[[1., 0, 0], [9, 9, 9], [0, 2, 0]]] * 2)) == [2, 2]
    assert [pick(h)[0] for h in erpm.HEADS] == [0, 1, 2]
    assert pick("oracle", y=torch.tensor([1, 0])) == [2, 0] and pick("oracle", y=torch.tensor([2, 2])) == [0, 0]


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
    data = erpm.ImageSet("x", np.arange(64) % 5, "abcde", 32, images=images(64))
    settings = {"epochs": 2, "batch": 16, "lr": 1e-3, **cfg}
    erpm.fit(model, step or erpm.clean_step(0.0), data, erpm.Train(**settings),
             erpm.Runtime(amp="none", log_every=1, save_every=3), out=out, name="t", seed=0, key={})
    return model


def seeded_net():
    torch.manual_seed(0)
    return erpm.build("cifar:resnet8-s2", 5)


def freeze_statistics(net):
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.0
            m.train = lambda mode=True: m
            m.eval()
    return net


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    a, b = (quick_fit(tmp_path / str(k), tail_of(seeded_net()), tail_step_of(), accum=k) for k in (1, 4))
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
    gap = lambda m: sum((p - q).norm() for p, q in zip(m.parameters(), start.parameters()))  # noqa: E731
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
    data = erpm.ImageSet("x", np.arange(50) % 5, "abcde", 32, images=images(50))
    got = erpm.evaluate(s, data, batch=16, passes=4, amp="none")
    for rule in ("product", "kl", "clean", "soft", "max-logit"):
        p = s.predict(data.images, 4, rule)
        assert got["rules"][rule]["correct"] == int((p.probs.argmax(-1).numpy() == data.y).sum())
        assert got["rules"][rule]["heads"] == torch.bincount(p.head, minlength=3).tolist()
    assert got["sigma"] == pytest.approx(p.sigma.mean(0).tolist(), abs=1e-5)


def fake_rows(seeds=(0, 1), label="ERPM"):
    make = lambda seed, s, c, k: {                                             # noqa: E731
        "label": label, "weights": f"w{seed}", "set": s, "corruption": c, "severity": k, "n": 10, "seed": seed,
        "run": f"r{seed}", "trained_on": "shapes", "versions": "v", "rule": "product", "transform": "t",
        "train": {"images": 100, "seconds": 1.0}, "passes": 3,
        "rules": {r: {"correct": 5 + seed + (r == "robust"), "heads": [6, 0, 4]} for r in erpm.RULES}}
    return [make(seed, s, c[0] if c else "", c[1] if c else 0) for seed in seeds
            for s in ("shapes", "shapes-c") for c in erpm.cells(s)]


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
    new = [{**r, "weights": "new", "rules": {k: {"correct": 9, "heads": [5, 0, 5]} for k in r["rules"]}}
           for r in fake_rows((0,))]
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
    assert {"student.safetensors", "teacher.safetensors", "model.safetensors", "log.jsonl", "config.yaml",
            "results.jsonl", "report.md", "pictures.png", "apt", "lp"} == left
    assert len(result_rows(cwd / "runs/demo")) == 5 * 77
    for label in ("original", "teacher", "LP", "APT", "ERPM", "perfect routing", "always clean"):
        assert f"| {label} " in done.stdout


def test_a_second_demo_computes_nothing_again(demo):
    cwd, _ = demo
    before = (cwd / "runs/demo/results.jsonl").read_bytes()
    done = command("demo", *TINY, cwd=cwd)
    assert done.returncode == 0 and done.stdout.count("is there, kept") == 7
    assert (cwd / "runs/demo/results.jsonl").read_bytes() == before


def test_changed_settings_do_not_overwrite_a_run(demo):
    cwd, _ = demo
    before = (cwd / "runs/demo/config.yaml").read_bytes()
    done = command("pretrain", *TINY, "pretrain.lr=0.5", cwd=cwd)
    assert done.returncode == 2 and "made with other settings (pretrain.lr: 0.003 -> 0.5)" in done.stderr
    assert (cwd / "runs/demo/config.yaml").read_bytes() == before


def test_two_processes_give_identical_counts(demo, tmp_path):
    cwd, _ = demo
    subprocess.run(["cp", "-r", str(cwd / "runs"), str(tmp_path)], check=True)
    one = counts(tmp_path / "runs/demo")
    (tmp_path / "runs/demo/results.jsonl").unlink()
    done = command("eval", "run=demo", cwd=tmp_path, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert counts(tmp_path / "runs/demo") == one


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
    p = subprocess.Popen([sys.executable, str(HERE / "erpm.py"), "distill", *TINY], cwd=tmp_path, env=ENV,
                         stdout=subprocess.DEVNULL)
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


def fails(capsys, *words):
    """The one line that a failing command prints on stderr."""
    assert erpm.main([str(w) for w in words]) == 2
    line = capsys.readouterr().err
    assert line.startswith("erpm.py: ") and line.count("\n") == 1
    return line


def test_an_absent_set_names_folder_count_and_source(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, "eval", "--set", "imagenet-r")
    assert "data/imagenet-r" in line and "30,000" in line and "github.com/hendrycks/imagenet-r" in line
    assert "download=True" in fails(capsys, "eval", "--set", "fashion-mnist") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("words, says", [
    (["eval", "--set", "imagenet-rr"], "unknown set 'imagenet-rr'; did you mean 'imagenet-r'?"),
    (["eval", "--set", "shapes", "--model", "timm:resnet500"], "timm has no network 'resnet500'"),
    (["eval", "--set", "shapes", "eval.rule=products"], "unknown rule 'products'; did you mean 'product'?"),
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
])
def test_a_mistake_on_the_command_line_is_one_line_and_code_2(words, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, *words, *[t for t in TINY if words[0] == "distill" and t.split("=")[0] not in str(words)])
    assert says in line


def test_a_folder_with_one_class_or_a_broken_image_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tree(tmp_path / "one", ("cat",))
    assert "holds one class folder (cat)" in fails(capsys, "distill", f"data.name=folder:{tmp_path}/one")
    make_tree(tmp_path / "two")
    (tmp_path / "two/val/cat/3.png").write_bytes(b"no picture")
    line = fails(capsys, "eval", "--model", "cifar:resnet8", "--set", f"folder:{tmp_path}/two", "data.workers=1")
    assert f"cannot read the image {tmp_path}/two/val/cat/3.png" in line


def test_sets_lists_every_set(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert erpm.main(["sets"]) == 0
    out = capsys.readouterr().out
    assert all(f"| {name} " in out for name in erpm.SETS)
