"""erpm.py makes a large pretrained image classifier robust to real-world shift, cheaply, and
without losing what the model already knew.

    python erpm.py demo                                       # everything, on data made here, CPU
    torchrun --nproc-per-node 8 erpm.py distill --recipe imagenet-rn101 data.root=/data
    python erpm.py eval --run runs/imagenet-rn101 --set imagenet,imagenet-c,imagenet-r
    python erpm.py report --run runs/imagenet-rn101
    python erpm.py COMMAND --help                             # every key, its default and meaning

                                        +-> original tail + head (frozen) -> z0   teacher of "clean"
    images --> frozen backbone, once ---+
    x and x~ = augment(x)               +-> shared tail --+-> clean head      <- x    [A] eq. 3
         |                                  (tuned,       +-> combined head   <- x, x~
         |                                   dropout)     +-> robust head     <- x~   [A] eq. 4
         +--> small robust network -> zt                          teacher of "robust"
    At inference T dropout passes of tail and heads give sigma; sigma and the KL divergence to the
    combined head choose whether the clean or the robust head answers ([A] eq. 6).

Sections:
    1. BASICS
    2. CONFIG
    3. CORRUPTIONS
    4. AUGMENTATIONS
    5. DATA
    6. MODELS
    7. METHOD
    8. TRAINING
    9. EVALUATION
    10. REPORT
    11. BENCH
    12. COMMANDS

Papers:
    [A] Jain, Behl, Rawat, Vineet. Efficiently Robustify Pre-Trained Models. ICCV 2023.
    [B] Zhou, Wang, Wang, Wang. Distilling Out-of-Distribution Robustness from Vision-Language
        Foundation Models. NeurIPS 2023.
"""
from __future__ import annotations

import argparse
import atexit
import contextlib
import copy
import dataclasses
import datetime
import difflib
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import math
import os
import platform
import re
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import yaml
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms import v2
from tqdm import tqdm


# ==== 1. BASICS ====
# Errors for people, seeds as functions of keys, and what a process knows of its siblings.
# Nothing here touches a global generator.


class UserError(ValueError):
    """A mistake that a person can mend: the message says what, where and what to do (exit 2)."""


class Absent(UserError):
    """A set, or what scoring it takes, is not there at all; half a set is a plain UserError.

    reason: in a few words, for the sets that `all` passes over."""

    def __init__(self, message: str, reason: str = "not found (see `python erpm.py sets`)"):
        super().__init__(message)
        self.reason = reason


class Interrupted(Exception):
    """Ctrl-C or SIGTERM reached a safe point: the state is saved and the same command goes on."""


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint `; did you mean 'x'?` for a misspelt word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def choose(table: dict, name: str, what: str):
    """table[name].  Raises: UserError that lists the names and the nearest one."""
    if name not in table:
        raise UserError(f"unknown {what} {name!r}{nearest(name, list(table))} "
                        f"(known: {', '.join(table)})")
    return table[name]


def fold(*key) -> int:
    """63-bit seed, a function of the key alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(),
                          "little") >> 1


def rng(*key, device="cpu") -> torch.Generator:
    """Generator whose stream is a function of the key alone."""
    return torch.Generator(device).manual_seed(fold(*key))


def uniforms(seed: int, index: np.ndarray, n: int) -> np.ndarray:
    """n uniform numbers in [0, 1) for every index, a function of (seed, index) alone (SplitMix64).

    Shapes: index (B,) -> (B, n) float32.  Used where one generator an image would cost too much."""
    with np.errstate(over="ignore"):
        z = np.uint64(fold(seed)) + np.asarray(index, np.uint64)[:, None] * np.uint64(n)
        z = (z + np.arange(1, n + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) / 2.0 ** 24


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Returns when every process is here."""
    if dist.is_initialized():
        dist.barrier()


def say(text: str) -> None:
    """Prints a line on the first process only."""
    if world()[0] == 0:
        tqdm.write(text)
        sys.stdout.flush()


def progress(total: int, what: str, initial: int = 0) -> tqdm:
    """Progress bar in images (rate, time left) on the first process's terminal, else silent."""
    quiet = world()[0] != 0 or not sys.stderr.isatty()
    return tqdm(total=total, desc=what, initial=initial, unit="img", unit_scale=True, leave=False,
                disable=quiet)


def pick_device() -> torch.device:
    """This process's accelerator, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls write(temporary path) and moves the result to path: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    write(part)
    os.umask(mask := os.umask(0))
    part.chmod(0o666 & ~mask)                        # safetensors lets nobody else read its files
    os.replace(part, path)


def read_lines(path: Path | str, key: str) -> list[str]:
    """The lines of a text file that are not empty.  Raises: UserError that names the key."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{key}: cannot read {path} ({e}): expected a text file, a line each") \
            from None
    return [line.strip() for line in lines if line.strip()]


def file_sha(path: Path | str) -> str:
    """First 12 hex digits of the file's SHA-256."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:12]


@functools.cache
def versions() -> dict[str, str]:
    """Versions that a result depends on: this file (once: it may be edited during a long run),
    Python and the packages."""
    return {"erpm": file_sha(__file__), "python": platform.python_version(),
            "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": np.__version__}


# ==== 2. CONFIG ====
# The frozen dataclasses are schema, default, type and help.  config.yaml holds recipes: what
# differs from the defaults.  Precedence: default < recipe (or the run's own file) < key=value.


def opt(default, text: str):
    """Dataclass field with a default and a help text."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Data:
    """The training set, and how sets are cut."""
    name: str = opt("shapes", "training set, one of `python erpm.py sets`, or folder:PATH")
    root: str = opt("data", "folder that holds the data sets")
    size_px: int = opt(0, "side of the square images in pixels; 0 = the set's or network's own")
    classes: str = opt("", "classes to tune on: names joined by commas, or how many of the first; "
                           "empty = all.  SET@seen and SET@unseen are the images of these and of "
                           "the other classes")
    names: str = opt("", "file of the classes' names for text prompts, a line each in label order; "
                         "empty = the set's own (synsets: OpenAI's names for ImageNet)")
    n_train: int = opt(0, "training images used at most (drawn by seed 0); 0 = all")
    n_test: int = opt(0, "images used at most of each evaluated set (likewise); 0 = all")
    allow_partial: bool = opt(False, "score a set whose number of images is not the published one")
    workers: int = opt(0, "loader processes; images that are decoded from files want 4 or more")


@dataclass(frozen=True)
class Model:
    """The two networks.  A name with a pretrained tag (timm:resnet50.tv_in1k) loads its weights."""
    student: str = opt("cifar:resnet14-w2-s2", "the large network M of [A]")
    head: str = opt("linear", "linear, or text = zero-shot, the embeddings of prompts classify: "
                              "for networks with a text tower (open_clip:, clip-tiny:)")
    vocabulary: str = opt("", "file of texts that distill.anchor compares images with; empty = the "
                              "captions of all training images, of every class")
    templates: str = opt("", "file of prompt templates, a line each with {} for the class; empty = "
                             "OpenAI's 80 for ImageNet, else 'a photo of a {}.'")
    student_weights: str = opt("", "its weights file; empty = by tag, or made by pretrain")
    teacher: str = opt("cifar:resnet14-s2", "the small network M_t of [A]")
    teacher_weights: str = opt("", "weights of a ready robust teacher; empty = made by robustify")


@dataclass(frozen=True)
class Train:
    """One training stage."""
    epochs: float = opt(8.0, "passes over the stage's images")
    n_images: int = opt(0, "training images of this stage at most (drawn by seed 0); 0 = all")
    batch: int = opt(128, "images a step, over all processes")
    accum: int = opt(1, "micro-batches that a step is made of")
    optimizer: str = opt("adamw", "adamw or sgd (momentum 0.9, Nesterov)")
    lr: float = opt(3e-3, "peak learning rate; cosine to zero")
    weight_decay: float = opt(0.05, "decoupled for adamw; none on biases and norms")
    warmup: float = opt(0.5, "epochs of linear warm-up")
    clip: float = opt(1.0, "largest gradient norm; 0 = off")
    ema: float = opt(0.0, "decay of the averaged weights that are kept; 0 = off")
    smoothing: float = opt(0.0, "label smoothing")


@dataclass(frozen=True)
class Pretrain(Train):
    """How the student learns clean data, where its name has no pretrained weights for them."""
    tune: int = opt(-1, "last stages that are trained, the classifier always; -1 = all, "
                        "0 = linear probe (L-BFGS on features that are computed once)")


@dataclass(frozen=True)
class Robustify(Train):
    """How the small teacher is made robust; its augmentation also makes x~ for distill."""
    augment: str = opt("augmix", "augmentations, joined by +")
    severity: float = opt(3.0, "strength of augmix; [A]'s sources use 1 on ImageNet, 3 on CIFAR")
    pictures: str = opt("", "pixmix: folder of pictures to mix in; empty = fractals made here")
    extra: str = opt("", "trees of the same classes, joined by commas, that join the training "
                         "images (DeepAugment: its EDSR and CAE copies)")
    jsd: float = opt(12.0, "weight of AugMix's consistency loss; 0 = cross-entropy on x and x~")


@dataclass(frozen=True)
class Distill(Train):
    """How the large network is tuned.  tune = last stages tuned, head = of these, own a head."""
    method: str = opt("erpm", "erpm, or the baselines apt (same part, one head, no teacher), "
                              "lp (linear probe on x and x~)")
    tune: int = opt(3, "last stages that are tuned")
    head: int = opt(3, "of the tuned stages the last ones that every head has for itself; "
                       "0 = linear heads on a shared tail")
    dropout: float = opt(0.1, "dropout rate in the tuned part and before each classifier")
    dropout_in: str = opt("tail", "tail = tuned stages and classifiers as [A]; head = classifiers")
    alpha: float = opt(0.5, "weight of the distillation loss; 0 = no distillation")
    temperature: float = opt(2.0, "softmax temperature of the distillation")
    anchor: float = opt(0.0, "zero-shot: weight of the distillation of the initial network's view "
                             "of the vocabulary (model.vocabulary) into every head; 0 = [A]")


@dataclass(frozen=True)
class Eval:
    """What is scored and how."""
    sets: str = opt("", "sets, joined by commas, or all (that are found); empty = the training "
                        "set, its -c and its -r")
    models: str = opt("", "networks to score instead of a run, joined by commas (--model): names "
                          "with a pretrained tag, NAME=WEIGHTS_FILE, run:FOLDER; probe: before it "
                          "= by linear probes only, LABEL@ = its name in the tables")
    rule: str = opt("product", "selection rule of the headline figure; all rules are recorded")
    probe: str = opt("clean", "head whose features a linear probe is trained on, for sets of other "
                              "classes: clean, combined, robust or original")
    passes: int = opt(10, "dropout passes; 0 = closed form")
    n_cell: int = opt(0, "images used at most of each cell of a generated -c set; 0 = all")
    batch: int = opt(256, "images a forward")
    frost_dir: str = opt("", "folder of the original frost textures; empty = those of the package "
                             "imagecorruptions or imagenet-c where installed, else made here")
    jpeg: bool = opt(True, "JPEG round trip (quality 85) of generated -c sets, as in the files")


@dataclass(frozen=True)
class Runtime:
    """What changes speed and safety, not meaning."""
    amp: str = opt("auto", "auto, bf16, fp16 or none: autocast type of networks")
    log_every: int = opt(20, "steps between lines of log.jsonl")
    save_every: int = opt(200, "steps between checkpoints")


@dataclass(frozen=True)
class Config:
    """Everything.  `python erpm.py COMMAND section.key=value ...` changes it."""
    recipe: str = opt("demo", "recipe of config.yaml")
    run: str = opt("", "name of the run; empty = recipe, data set if changed, seed if not 0")
    out: str = opt("runs", "folder of the runs")
    seed: int = opt(0, "seed of everything but the cuts of the data")
    data: Data = Data()
    model: Model = Model()
    pretrain: Pretrain = Pretrain()
    robustify: Robustify = Robustify()
    distill: Distill = Distill()
    eval: Eval = Eval()
    runtime: Runtime = Runtime()

    @property
    def dir(self) -> Path:
        return Path(self.out) / self.run


OPTIMIZERS = ("adamw", "sgd")
METHODS = ("erpm", "apt", "lp")


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key that stands twice (plain YAML keeps the last silently)."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        for k in keys:
            if keys.count(k) > 1:
                raise UserError(f"{node.start_mark.name}, line {node.start_mark.line + 1}: "
                                f"the key {k!r} stands twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """The file's mapping.  Raises: UserError on a missing file, bad YAML or a duplicate key."""
    if not path.is_file():
        raise UserError(f"no file {path}: give --config PATH")
    try:
        with open(path) as f:
            tree = yaml.load(f, _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping at the top")
    return tree


def typed(value, kind: str, path: str):
    """value as the field's type.  Raises: UserError naming path, expected and got."""
    text = isinstance(value, str)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if kind == "bool" and (isinstance(value, bool) or value in ("true", "false")):
            return value in (True, "true")
        if kind in ("int", "float") and not isinstance(value, bool):
            number = {"int": int, "float": float}[kind](value)
            if text or number == value:
                return number
        if kind == "str" and text:
            return value
    hint = " (quote it: YAML reads no, on, 12:30 as other types)" if kind == "str" else ""
    raise UserError(f"{path}: expected {kind}, got {value!r}{hint}")


def merge(base, tree: dict, where: str, path: str = ""):
    """base with the values of tree put over it.  Raises: UserError on an unknown key or type."""
    fields, changed = {f.name: f for f in dataclasses.fields(base)}, {}
    for key, value in tree.items():
        at = f"{path}{key}"
        if key not in fields:
            raise UserError(f"{where}: unknown key {at!r}{nearest(str(key), list(fields))} "
                            f"(known: {', '.join(fields)})")
        old = getattr(base, key)
        if dataclasses.is_dataclass(old):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {at} is a section, got {value!r}; "
                                f"write {at}.KEY=VALUE")
            changed[key] = merge(old, value, where, at + ".")
        else:
            changed[key] = typed(value, fields[key].type, f"{where}: {at}")
    return dataclasses.replace(base, **changed)


def words_tree(words: Sequence[str]) -> dict:
    """Nested mapping of `a.b=c` words."""
    tree: dict = {}
    for word in words:
        path, eq, value = word.partition("=")
        if not eq:
            raise UserError(f"{word!r} is not of the form key=value (see --help)")
        *sections, key = path.split(".")
        node = tree
        for s in sections:
            node = node.setdefault(s, {})
            if not isinstance(node, dict):
                raise UserError(f"command line: {s} is given a value and used as a section")
        node[key] = value
    return tree


def check(cfg: Config) -> None:
    """Raises: UserError where a value of the right type makes no sense."""
    d = cfg.distill
    stages_ = {"pretrain": cfg.pretrain, "robustify": cfg.robustify, "distill": d}
    positive = {f"{name}.{k}": getattr(stage, k) for name, stage in stages_.items()
                for k in ("epochs", "batch", "accum", "lr")}
    positive |= {"eval.batch": cfg.eval.batch, "runtime.log_every": cfg.runtime.log_every,
                 "runtime.save_every": cfg.runtime.save_every, "distill.temperature": d.temperature}
    for key, value in positive.items():
        if not 0 < value < math.inf:
            raise UserError(f"{key}: expected a value above 0, got {value}")
    counts = {"data.workers": cfg.data.workers, "data.n_train": cfg.data.n_train,
              "data.n_test": cfg.data.n_test, "eval.passes": cfg.eval.passes,
              "eval.n_cell": cfg.eval.n_cell, "distill.tune": d.tune}
    for key, value in counts.items():
        if value < 0:
            raise UserError(f"{key}: expected 0 or more, got {value}")
    for name, stage in stages_.items():
        if stage.batch % stage.accum:
            raise UserError(f"{name}.accum: {stage.batch} images are not {stage.accum} equal "
                            "micro-batches")
        choose(dict.fromkeys(OPTIMIZERS), stage.optimizer, f"{name}.optimizer")
    for key, value in {"distill.dropout": d.dropout, "distill.alpha": d.alpha}.items():
        if not 0 <= value <= 1 or value == 1 and key == "distill.dropout":
            raise UserError(f"{key}: expected a value from 0 to 1, got {value}")
    if not 0 <= d.head <= d.tune:
        raise UserError(f"distill.head: expected 0 to distill.tune = {d.tune}, got {d.head}")
    if cfg.data.size_px and not 32 <= cfg.data.size_px <= 512:
        raise UserError(f"data.size_px: expected 0 or 32 to 512, got {cfg.data.size_px}")
    for key, value, known in (("distill.dropout_in", d.dropout_in, ("tail", "head")),
                              ("distill.method", d.method, METHODS),
                              ("model.head", cfg.model.head, ("linear", "text")),
                              ("eval.probe", cfg.eval.probe,
                               ("clean", "combined", "robust", "original")),
                              ("runtime.amp", cfg.runtime.amp, ("auto", "bf16", "fp16", "none"))):
        choose(dict.fromkeys(known), value, key)


def resolve(recipe: str, words: Sequence[str], file: Path | None = None,
            run: Path | None = None) -> Config:
    """The frozen Config: default < recipe (or the run's config.yaml) < key=value words."""
    base, given = Config(), file is not None
    if run is not None:
        base = merge(base, read_yaml(run / "config.yaml"), str(run / "config.yaml"))
    else:
        file = file or Path(__file__).with_name("config.yaml")
        plain = recipe == "demo" and not given and not file.is_file()
        recipes = {"demo": {}} if plain else read_yaml(file)
        base = merge(base, choose(recipes, recipe, f"recipe in {file}") or {}, f"{file}: {recipe}")
        base = dataclasses.replace(base, recipe=recipe)
    cfg = merge(base, words_tree(words), "command line")
    check(cfg)
    if not cfg.run:
        data = [] if cfg.data.name == base.data.name else [re.sub(r"\W+", "-", cfg.data.name)]
        seed = [f"s{cfg.seed}"] if cfg.seed else []
        cfg = dataclasses.replace(cfg, run="-".join([cfg.recipe, *data, *seed]))
    return cfg


def config_help(cfg=None, path: str = "") -> str:
    """Every key, its default and meaning, a line each."""
    lines = []
    cfg = cfg or Config()
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if dataclasses.is_dataclass(value):
            lines += ["", f"{f.name}: {value.__doc__}", config_help(value, f"{f.name}.")]
        else:
            lines.append(f"  {path + f.name + '=' + str(value):<42} {f.metadata['help']}")
    return "\n".join(lines)


# ==== 3. CORRUPTIONS ====
# ImageNet-C's 15 + 4 corruptions as batched tensor code: uint8 (B,3,H,W) in and out, on the device
# of the images. Randomness is a function of (seed, image index, name, severity), not of the batch.

CONSTANTS = {  # severities 1..5 of make_imagenet_c.py, make_tinyimagenet_c.py, make_cifar_c.py
    "gaussian_noise": ((.08, .12, .18, .26, .38), (.04, .08, .12, .15, .18),
                       (.04, .06, .08, .09, .1)),
    "shot_noise": ((60, 25, 12, 5, 3), (250, 100, 50, 30, 15), (500, 250, 100, 75, 50)),
    "impulse_noise": ((.03, .06, .09, .17, .27), (.01, .02, .05, .08, .14),
                      (.01, .02, .03, .05, .07)),
    "defocus_blur": (((3, .1), (4, .5), (6, .5), (8, .5), (10, .5)),
                     ((.5, .6), (1, .1), (1.5, .1), (2.5, .01), (3, .1)),
                     ((.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1))),
    "glass_blur": (((.7, 1, 2), (.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
                   ((.1, 1, 1), (.5, 1, 1), (.6, 1, 2), (.7, 2, 1), (.9, 2, 2)),
                   ((.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2))),
    "motion_blur": (((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
                    ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
                    ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (((1.11, .01), (1.16, .01), (1.21, .02), (1.26, .02), (1.31, .03)),
                  ((1.06, .01), (1.11, .01), (1.16, .01), (1.21, .01), (1.26, .01)),
                  ((1.06, .01), (1.11, .01), (1.16, .01), (1.21, .01), (1.26, .01))),
    "snow": (((.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7), (.55, .3, 4, .9, 12, 8, .7),
              (.55, .3, 4.5, .85, 12, 8, .65), (.55, .3, 2.5, .85, 12, 12, .55)),
             ((.1, .2, 1, .6, 8, 3, .8), (.1, .2, 1, .5, 10, 4, .8),
              (.15, .3, 1.75, .55, 10, 4, .7), (.25, .3, 2.25, .6, 12, 6, .65),
              (.3, .3, 1.25, .65, 14, 12, .6)),
             ((.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9),
              (.15, .3, 1.75, .55, 10, 4, .9), (.25, .3, 2.25, .6, 12, 6, .85),
              (.3, .3, 1.25, .65, 14, 12, .8))),
    "frost": (((1, .4), (.8, .6), (.7, .7), (.65, .7), (.6, .75)),
              ((1, .3), (.9, .4), (.8, .45), (.75, .5), (.7, .55)),
              ((1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45))),
    "fog": (((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
            ((.4, 3), (.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
            ((.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": ((.1, .2, .3, .4, .5), (.1, .2, .3, .4, .5), (.05, .1, .15, .2, .3)),
    "contrast": ((.4, .3, .2, .1, .05), (.4, .3, .2, .1, .05), (.75, .5, .4, .3, .15)),
    "elastic_transform": (
        ((2, .7, .1), (2, .08, .2), (.05, .01, .02), (.07, .01, .02), (.12, .01, .02)),
        ((0, 0, .08), (.05, .3, .06), (.1, .08, .06), (.1, .03, .03), (.16, .03, .02)),
        ((0, 0, .08), (.05, .2, .07), (.08, .06, .06), (.1, .04, .05), (.1, .03, .03))),
    "pixelate": ((.6, .5, .4, .3, .25), (.9, .8, .7, .6, .5), (.95, .9, .85, .75, .65)),
    "jpeg_compression": ((25, 18, 15, 10, 7), (65, 58, 50, 40, 25), (80, 65, 58, 50, 40)),
    "speckle_noise": ((.15, .2, .35, .45, .6), (.15, .2, .25, .3, .35), (.06, .1, .12, .16, .2)),
    "gaussian_blur": ((1, 2, 3, 4, 6), (.5, .75, 1, 1.25, 1.5), (.4, .6, .7, .8, 1)),
    "spatter": (((.65, .3, 4, .69, .6, 0), (.65, .3, 3, .68, .6, 0), (.65, .3, 2, .68, .5, 0),
                 (.65, .3, 1, .65, 1.5, 1), (.67, .4, 1, .65, 1.5, 1)),
                ((.62, .1, .7, .7, .6, 0), (.65, .1, .8, .7, .6, 0), (.65, .3, 1, .69, .6, 0),
                 (.65, .1, .7, .68, .6, 1), (.65, .1, .5, .67, .6, 1)),
                ((.62, .1, .7, .7, .5, 0), (.65, .1, .8, .7, .5, 0), (.65, .3, 1, .69, .5, 0),
                 (.65, .1, .7, .69, .6, 1), (.65, .1, .5, .68, .6, 1))),
    "saturate": (((.3, 0), (.1, 0), (2, 0), (5, .1), (20, .2)),
                 ((.3, 0), (.1, 0), (2, 0), (5, .1), (30, .2)),
                 ((.3, 0), (.1, 0), (1.5, 0), (2, .1), (2.5, .2))),
}
CORRUPTIONS = tuple(CONSTANTS)
CORRUPTIONS_15 = CORRUPTIONS[:15]  # the benchmark; the last four are for validation


def scale_of(h, w):
    """Column of CONSTANTS: 0 ImageNet, 1 Tiny ImageNet (longer side to 128 px), 2 CIFAR (to 48)."""
    return (max(h, w) <= 128) + (max(h, w) <= 48)


def draw(gens, shape, fill, *args, dtype=torch.float32):
    """(B,*shape) on the generators' device, row k filled by `fill` from generator k: what an image
    draws does not depend on its batch."""
    out = torch.empty(len(gens), *shape, dtype=dtype, device=gens[0].device)
    for g, row in zip(gens, out):
        fill(row, *args, generator=g)
    return out


def truncate(y):
    """uint8 of float values on 0..255, cut and not rounded, as the published files; overwrites y.
    1/512 absorbs the float error that would turn 100 into 99; by way of int16 it is faster."""
    return y.add_(1 / 512).clamp_(0, 255).to(torch.int16).to(torch.uint8)


def pad_edge(x, left, right, top, bottom):
    """(...,H,W) with the edge repeated, float32; on one core several times faster than F.pad."""
    h, w = x.shape[-2:]
    out = x.new_empty(*x.shape[:-2], h + top + bottom, w + left + right, dtype=torch.float32)
    rows = out[..., top:top + h, :]
    rows[..., left:left + w] = x
    rows[..., :left], rows[..., left + w:] = x[..., :1], x[..., -1:]
    out[..., :top, :], out[..., top + h:, :] = rows[..., :1, :], rows[..., -1:, :]
    return out


def slide(x, taps, dim):
    """Correlation with taps along dim, which shrinks by len(taps) - 1. A sum of shifted views: the
    image stays in cache, and the rounding does not depend on the batch."""
    n = x.shape[dim] - len(taps) + 1
    out = x.narrow(dim, 0, n) * taps[0]
    for i, t in enumerate(taps[1:], 1):
        out.add_(x.narrow(dim, i, n), alpha=t)
    return out


def gaussian_taps(sigma, radius):
    """Gaussian on -radius..radius with sum 1, a list; sigma 0 is the identity."""
    k = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(sigma, 1e-9)) ** 2)
    return (k / k.sum()).tolist()


def gaussian(x, sigma):
    """Gaussian blur of (...,H,W), edge repeated, cut at 4 sigma."""
    r = int(4 * sigma + 0.5)
    taps = gaussian_taps(sigma, r)
    return slide(slide(pad_edge(x, r, r, r, r), taps, -1), taps, -2)


def motion(x, radius, sigma, angles):
    """(B,C,H,W) smeared along one angle (degrees) an image: a one-sided half Gaussian of 2 radius +
    1 taps at whole-pixel offsets, edge repeated, so the content shifts: as ImageMagick does."""
    h, w = x.shape[-2:]
    taps = gaussian_taps(sigma, 2 * radius)[2 * radius:]
    taps, ways = [t / sum(taps) for t in taps], [math.radians(a) for a in angles]
    paths = [[(math.ceil(i * math.sin(a) - 0.5), math.ceil(i * math.cos(a) - 0.5))
              for i in range(len(taps))] for a in ways]
    dys, dxs = zip(*(step for path in paths for step in path))
    top, left = -min(dys), -min(dxs)
    padded = pad_edge(x, left, max(dxs), top, max(dys))
    out = torch.zeros_like(x, dtype=torch.float32)
    for p, o, path in zip(padded, out, paths):
        for (dy, dx), t in zip(path, taps):
            o.add_(p[:, top + dy:top + dy + h, left + dx:left + dx + w], alpha=t)
    return out


def gaussian_noise(x, c, gens):
    """x + noise of standard deviation c."""
    return truncate(draw(gens, x.shape[1:], torch.Tensor.normal_).mul_(255 * c).add_(x))


def speckle_noise(x, c, gens):
    """x + x * noise of standard deviation c."""
    return truncate(draw(gens, x.shape[1:], torch.Tensor.normal_).mul_(c).add_(1).mul_(x))


@functools.lru_cache(maxsize=8)
def poisson_table(photons, device, levels=4096):
    """uint8 (256 * levels,): row v holds the noisy values of pixel value v at even quantiles."""
    n = torch.arange(photons + 1, dtype=torch.float64)  # counts above white are clipped anyway
    rate = torch.arange(256, dtype=torch.float64)[:, None] * (photons / 255)
    q = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    cdf = torch.special.gammaincc(n + 1, rate)  # P(count <= n)
    counts = torch.searchsorted(cdf, q.expand(256, -1).contiguous()).clamp_(max=photons)
    return truncate(counts * (255 / photons)).flatten().to(device)


def shot_noise(x, c, gens):
    """Poisson counts with c photons at white: a random quantile, looked up in a table."""
    key = draw(gens, x.shape[1:], torch.Tensor.random_, 0, 4096, dtype=torch.int32)
    key = key.add_(x.int(), alpha=4096).flatten()
    return poisson_table(c, x.device).index_select(0, key).view(x.shape)


def impulse_noise(x, c, gens):
    """A share c of the elements (not pixels) set to 0 or 255."""
    u = draw(gens, x.shape[1:], torch.Tensor.uniform_)
    return x.masked_fill(u < c, 255).masked_fill_(u < c / 2, 0)


@functools.lru_cache(maxsize=8)
def disk_spectrum(radius, sigma, reach, h, w, device):
    """Transfer function on a torus (h,w) of a disk smoothed by a 3x3 (to radius 8) or 5x5 Gaussian,
    which mirrors the kernel at its own edge: at radius 8 and 10 that brightens the image by 1 %."""
    half, g = 1 if radius <= 8 else 2, torch.arange(-reach, reach + 1)
    k = (g[:, None] ** 2 + g ** 2 <= radius ** 2).double()
    k = F.pad((k / k.sum())[None], (half,) * 4, mode="reflect")[0]
    k = slide(slide(k, gaussian_taps(sigma, half), 0), gaussian_taps(sigma, half), 1)
    k = F.pad(k, (0, w - len(g), 0, h - len(g))).roll((-reach, -reach), (0, 1))
    return torch.fft.rfft2(k).to(device, torch.complex64)


def defocus_blur(x, c):
    """Disk blur, c = radius and smoothing, mirrored about the edge pixel; at one cost for all."""
    (h, w), r = x.shape[-2:], max(8, c[0])
    size = (h + 2 * r, w + 2 * r)
    y = torch.fft.rfft2(F.pad(x.float(), (r, r, r, r), mode="reflect"))
    y = torch.fft.irfft2(y.mul_(disk_spectrum(*c, r, *size, x.device)), s=size)
    return truncate(y[..., r:r + h, r:r + w])


def gaussian_blur(x, c):
    """Gaussian blur of sigma c."""
    return truncate(gaussian(x, c))


@functools.lru_cache(maxsize=8)
def shuffle_plan(n, h, w, d, device):
    """For n images end to end, int32: pixel numbers (n*h*w,); 1 where the shuffle writes (rows and
    columns d+1 .. size-d), else 0; the offsets -d..d-1 (not d: the reference) in pixel numbers."""
    active = torch.zeros(n, h, w, dtype=torch.int32)
    active[:, d + 1:h - d + 1, d + 1:w - d + 1] = 1
    steps = torch.arange(-d, d, dtype=torch.int32)
    steps, here = (steps[:, None] * w + steps).flatten(), torch.arange(n * h * w, dtype=torch.int32)
    return here.to(device), active.flatten().to(device), steps.to(device)


def glass_blur(x, c, gens):
    """Gaussian, local shuffle, Gaussian; c = sigma, reach, passes. The shuffle visits the pixels in
    reverse raster order and copies into each the pixel at a random offset (the reference's swap of
    two views is a copy), which may itself be a copy made earlier in the pass. Pointer doubling
    follows such chains, up to 32 links."""
    sigma, d, passes = c
    n, _, h, w = x.shape
    here, active, steps = shuffle_plan(n, h, w, d, x.device)
    source = here
    for _ in range(passes):
        pick = draw(gens, (h * w,), torch.Tensor.random_, 0, 4 * d * d, dtype=torch.int32)
        step = steps.index_select(0, pick.flatten()).mul_(active)
        j = here + step
        made = active.index_select(0, j).mul_(step > 0)  # 1: j was itself written in this pass
        link = step.mul_(made).add_(here)
        for _ in range(5 if d > 1 else 0):  # an offset of reach 1 never points to such a pixel
            link = link.index_select(0, link)
        source = source.index_select(0, j.index_select(0, link))
    y = truncate(gaussian(x, sigma)).transpose(0, 1).reshape(3, -1).index_select(1, source)
    return truncate(gaussian(y.view(3, n, h, w).transpose(0, 1), sigma))


def motion_blur(x, c, gens):
    """Smear along an angle within 45 degrees of the horizontal, c = radius and sigma."""
    return truncate(motion(x, *c, draw(gens, (), torch.Tensor.uniform_, -45, 45).tolist()))


def zoom_taps(n, zoom):
    """Source pixels and weights (n,2) of the centre of n pixels enlarged by `zoom`: bilinear with
    aligned corners to round(ceil(n / zoom) * zoom) pixels, trimmed to n."""
    crop = math.ceil(n / zoom)
    size = round(crop * zoom)
    s = (torch.arange(n, dtype=torch.float64) + (size - n) // 2) * ((crop - 1) / (size - 1))
    i = s.floor().clamp_(max=crop - 2)
    f, i = s - i, i.long() + (n - crop) // 2
    return torch.stack([i, i + 1], 1), torch.stack([1 - f, f], 1)


@functools.lru_cache(maxsize=3)
def zoom_matrix(h, w, stop, step, device):
    """Zoom blur as a sparse matrix: source pixels (h*w,N) int32 and weights, 25 MB at 224 px."""
    factors = [1.0, *np.arange(1, stop, step).tolist()]  # the image itself, and again as factor 1
    taps = [(zoom_taps(h, z), zoom_taps(w, z)) for z in factors]
    index = [(a[:, None, :, None] * w + b[None, :, None]).int() for (a, _), (b, _) in taps]
    value = [(a[:, None, :, None] * b[None, :, None]).float() for (_, a), (_, b) in taps]
    index, value = (torch.stack(t, 2).view(h * w, -1).to(device) for t in (index, value))
    return index, value / len(factors)


def zoom_blur(x, c):
    """Mean of the image and of its centre enlarged by each factor, c = end and step of the factors:
    one sparse matrix, applied to the planes of several images side by side."""
    b, _, h, w = x.shape
    index, weights = zoom_matrix(h, w, *c, x.device)
    planes = x.reshape(3 * b, h * w).t().contiguous().float()  # (HW,3B)
    y = F.embedding_bag(index, planes, mode="sum", per_sample_weights=weights)
    return truncate(y).t().reshape(b, 3, h, w)


def snow(x, c, gens):
    """Whitened image + flakes (thresholded noise, enlarged, smeared) + the flakes turned around."""
    mean, std, zoom, threshold, radius, sigma, keep = c
    h, w = x.shape[-2:]
    crop = (1, math.ceil(h / zoom), math.ceil(w / zoom))
    flakes = draw(gens, crop, torch.Tensor.normal_, mean, std)
    size = [round(n * zoom) for n in flakes.shape[-2:]]
    flakes = F.interpolate(flakes, size=size, mode="bilinear", align_corners=True)
    flakes = flakes[..., (size[0] - h) // 2:, (size[1] - w) // 2:][..., :h, :w]
    flakes = truncate(flakes * (flakes >= threshold) * 255)  # 8 bits before and after the smear
    angles = draw(gens, (), torch.Tensor.uniform_, -135, -45).tolist()
    flakes = truncate(motion(flakes, radius, sigma, angles)).float()
    y = x.float()
    white = (y[:, :1] * 0.299).add_(y[:, 1:2], alpha=0.587).add_(y[:, 2:], alpha=0.114)
    white = torch.maximum(y, white.mul_(1.5).add_(127.5)).mul_(1 - keep)
    return truncate(white.add_(y, alpha=keep).add_(flakes + flakes.flip(-2, -1)))


ICE_FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")  # not the sixth


def frost_folder(folder=None):
    """The folder of the original textures: `folder`, or a PyPI package's, or None."""
    specs = [importlib.util.find_spec(p) for p in ("imagecorruptions", "imagenet_c")]  # no import
    folders = [Path(s.origin).parent / "frost" for s in specs if s and s.origin]
    return folder or next((f for f in folders if all((f / n).is_file() for n in ICE_FILES)), None)


# The original's textures (its third is a copy of its second): height, width, mean RGB, standard
# deviation RGB, power (dB) of a 224 px crop in eight bands of equal ratio from 2/224 to 1/2 a px.
ICE = ((600, 900, (.305, .585, .650), (.106, .065, .060), (37, 30, 24, 19, 16, 14.2, 12.6, 7.7)),
       (315, 560, (.787, .805, .841), (.084, .087, .089), (35, 32, 29.3, 27.3, 23, 18.5, 14.8, 9)),
       (350, 527, (.540, .599, .648), (.112, .112, .117), (35, 33, 30.6, 28.8, 25.6, 23, 20, 14.3)),
       (495, 660, (.441, .484, .528), (.174, .170, .163), (42, 40, 36, 31.7, 27.8, 23.6, 19, 15.4)))


def procedural_ice(i):
    """uint8 (3,H,W) like texture i: needles in eight directions, each in its own patches, given the
    measured power at every radius, and a smooth field that makes up the deviation."""
    h, w, mean, std, bands = ICE[(0, 1, 1, 2, 3)[i]]
    g, grey = rng("ice", i), (sum(s * s for s in std) / 3) ** 0.5
    fy, fx = torch.fft.fftfreq(h)[:, None], torch.fft.rfftfreq(w)
    radius = torch.hypot(fy, fx)
    needles = 0
    for k in range(9):
        soft = torch.fft.rfft2(torch.randn(h, w, generator=g)) * torch.exp(-(60 * radius) ** 2)
        patch = torch.fft.irfft2(soft, s=(h, w))
        angle = (k + torch.rand(1, generator=g).item()) * math.pi / 9
        along, across = (fx * math.cos(a) + fy * math.sin(a) for a in (angle, angle + math.pi / 2))
        seeds = (torch.rand(h, w, generator=g) < 0.02) * (patch > patch.std() / 2).float()
        needles += torch.fft.rfft2(seeds) * torch.exp(-(40 * along) ** 2 - (2 * across) ** 2)
    ring = (radius * 300).long().flatten()
    power = torch.bincount(ring, needles.abs().square().flatten())
    power /= torch.bincount(ring).clamp(min=1)
    centres = np.log(np.append(np.geomspace(2 / 224, 0.5, 17)[1::2], 0.7))
    level = np.interp(np.log(radius.numpy() + 1e-9), centres, (*bands, bands[-1] - 8))
    gain = torch.from_numpy(10 ** (level / 20)).float() * (h * w) ** 0.5 / (224 * 3 / 8)  # Hann
    ice = needles * gain / power.clamp(min=1e-12).sqrt()[ring].view(gain.shape)
    soft = soft * torch.exp(-(170 * radius) ** 2)
    ice, soft = (torch.fft.irfft2(f, s=(h, w)) for f in (ice, soft))
    ice, soft = ice - ice.mean(), soft - soft.mean()
    ice += soft * ((grey ** 2 - ice.var()).clamp(min=0).sqrt() / soft.std())
    mean, std = (torch.tensor(v)[:, None, None] for v in (mean, std))
    return truncate(255 * (mean + std * ice / grey))


@functools.lru_cache(maxsize=10)
def frost_texture(folder, i):
    """Texture i at full size, uint8 (3,H,W)."""
    folder = frost_folder(folder)
    if folder is None:
        return procedural_ice(i)
    with Image.open(Path(folder) / ICE_FILES[i]) as file:
        return torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)


@functools.lru_cache(maxsize=32)
def frost_textures(folder, h, w, device):
    """The five textures at the scale for images of (h,w), larger where they would not cover one."""
    out = []
    for ice in (frost_texture(folder, i) for i in range(5)):
        size, scale = ice.shape[1:], (1, 0.3, 0.2)[scale_of(h, w)]
        if scale * size[0] < h or scale * size[1] < w:
            scale = 1.1 * max(h / size[0], w / size[1])
        if scale != 1:
            size = [round(n * scale) for n in size]
            ice = truncate(F.interpolate(ice[None].float(), size=size, mode="bilinear")[0] + 0.5)
        out.append(ice.to(device))
    return out


def frost(x, c, gens, folder=None):
    """c0 * image + c1 * a random crop of one of five pictures of ice."""
    h, w = x.shape[-2:]
    textures = frost_textures(folder, h, w, x.device)
    out = x.float().mul_(c[0])
    for o, (which, u, v) in zip(out, draw(gens, (3,), torch.Tensor.uniform_).tolist()):
        ice = textures[int(which * 5)]
        top, left = int(u * (ice.shape[1] - h)), int(v * (ice.shape[2] - w))
        o.add_(ice[:, top:top + h, left:left + w], alpha=c[1])
    return truncate(out)


def plasma(gens, side, decay):
    """Diamond-square heights on a torus, on [0,1]: (B,side,side)."""
    u = draw(gens, (side, side), torch.Tensor.uniform_, -1, 1)
    m, step, amplitude = torch.zeros_like(u), side, 1.0
    while step > 1:
        half = step // 2
        noise = u[:, ::half, ::half] * amplitude
        corners = m[:, ::step, ::step].clone()
        rows = corners + corners.roll(-1, 1)
        centres = (rows + rows.roll(-1, 2)).mul_(0.25).add_(noise[:, 1::2, 1::2])
        m[:, half::step, half::step] = centres
        s = centres + centres.roll(1, 1) + corners + corners.roll(-1, 2)
        m[:, ::step, half::step] = s.mul_(0.25).add_(noise[:, ::2, 1::2])
        s = centres + centres.roll(1, 2) + corners + corners.roll(-1, 1)
        m[:, half::step, ::step] = s.mul_(0.25).add_(noise[:, 1::2, ::2])
        step, amplitude = half, amplitude / decay ** 2  # squared: wobble times itself
    m -= m.amin((1, 2), keepdim=True)
    return m.div_(m.amax((1, 2), keepdim=True))


def fog(x, c, gens):
    """Image + c0 * plasma, scaled back by the image's own maximum."""
    h, w = x.shape[-2:]
    peak = x.amax((1, 2, 3)).float()[:, None, None, None]
    y = plasma(gens, 1 << (max(h, w) - 1).bit_length(), c[1])[:, None, :h, :w]
    return truncate((y * (255 * c[0]) + x).mul_(peak / (peak + 255 * c[0])))


def brightness(x, c):
    """V + c in HSV: at fixed hue and saturation all channels scale with V; black turns grey."""
    y = x.float()
    v = y.amax(1, keepdim=True)
    new = (v + 255 * c).clamp_(max=255)
    return truncate(torch.where(v == 0, new, y.mul_(new / v)))


def saturate(x, c):
    """S * c0 + c1 in HSV: distances below V scale with S. Grey has hue 0: more S makes it red."""
    y = x.float()
    v = y.amax(1, keepdim=True)
    s = (v - y.amin(1, keepdim=True)) / v.clamp(min=1)
    new = (s * c[0] + c[1]).clamp_(max=1)
    red = torch.cat([v, v * (1 - new), v * (1 - new)], 1)
    return truncate(torch.where(s == 0, red, v - (v - y).mul_(new / s)))


def contrast(x, c):
    """Distance to each channel's own mean, times c."""
    y = x.float()
    return truncate(torch.lerp(y.mean((2, 3), keepdim=True), y, c))


@functools.lru_cache(maxsize=32)
def blur_matrix(n, sigma, device):
    """(n,n) Gaussian blur, cut at 3 sigma, mirrored about the edge as often as it takes."""
    r = int(3 * sigma + 0.5)
    i = (torch.arange(n)[:, None] + torch.arange(-r, r + 1)) % (2 * n)
    i = torch.where(i < n, i, 2 * n - 1 - i)
    m = torch.zeros(n, n).scatter_add_(1, i, torch.tensor(gaussian_taps(sigma, r)).expand(n, -1))
    return m.to(device)


def resample(x, grid, corners):
    """Bilinear x (B,C,H,W) at grid (B,2,H,W), columns and rows on -1..1, mirrored beyond. corners:
    -1 and 1 are the centres of the edge pixels, not their outer edges."""
    grid = grid.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=corners)


def affine(h, w, shift):
    """(B,2,3) float32, from output to input coordinates on -1..1: the map that moves three points
    around the centre by shift (B,3,2) pixels."""
    s, signs = min(h, w) // 3, ((1, 1), (1, -1), (-1, -1))
    points = [[h // 2 + i * s, w // 2 + j * s, 1] for i, j in signs]  # the reference has h with x
    points = torch.tensor(points).double()
    moved = points + F.pad(shift.cpu().double(), (0, 1))
    a = torch.linalg.solve(moved, points.expand_as(moved)).mT
    unit = torch.tensor([[2 / (w - 1), 0, -1], [0, 2 / (h - 1), -1], [0, 0, 1]]).double()
    return (unit @ a @ torch.linalg.inv(unit))[:, :2].float()


def elastic_transform(x, c, gens):
    """A random affine map (mirrored at the edge pixel), then a smooth random field (mirrored at
    the edge); c = amplitude, sigma and jitter in shares of the side."""
    b, _, h, w = x.shape
    side = min(h, w) * (1 if scale_of(h, w) else 244 / 224)  # 244: the reference's slip
    amplitude, sigma, jitter = (side * k for k in c)
    a = affine(h, w, draw(gens, (3, 2), torch.Tensor.uniform_, -jitter, jitter)).to(x.device)
    u, v = (torch.linspace(-1, 1, n, device=x.device) for n in (w, h))
    a, b, shift = a[..., None].unbind(2)  # (B,2,1) each
    grid = (a * u + shift)[:, :, None] + (b * v)[..., None]  # (B,2,H,W)
    y = resample(x.float(), grid, True)
    if amplitude:
        field = draw(gens, (2, h, w), torch.Tensor.uniform_, -amplitude, amplitude)
        rows, columns = blur_matrix(h, sigma, x.device), blur_matrix(w, sigma, x.device)
        for f in field:  # one by one, or the matrix product rounds by the size of the batch
            f.copy_(rows @ f @ columns.T)
        field[:, 0].mul_(2 / w).add_(u * ((w - 1) / w))
        field[:, 1].mul_(2 / h).add_(v[:, None] * ((h - 1) / h))
        y = resample(y, field, False)
    return truncate(y)


@functools.lru_cache(maxsize=64)
def box_windows(n, m, planes, device):
    """For `planes` stacks of n rows: all row numbers; the first row of each of a stack's m windows,
    whole pixels as Pillow's box filter cuts them; for each of n rows its window, to enlarge."""
    first = (torch.arange(m, dtype=torch.float64) * (n / m) + 0.5).long()
    first = (torch.arange(planes)[:, None] * n + first).flatten()
    back = ((torch.arange(n, dtype=torch.float64) + 0.5) * (m / n)).long()
    return torch.arange(planes * n, device=device), first.to(device), back.to(device)


def shrink(x, m):
    """(B,3,H,W) -> (B,3,m,W): means of m windows of rows, rounded."""
    b, _, n, w = x.shape
    rows, first, _ = box_windows(n, m, 3 * b, x.device)
    y = F.embedding_bag(rows, x.reshape(-1, w).float(), first, mode="mean")
    return y.add_(0.5).floor_().view(b, 3, m, w)


def pixelate(x, c):
    """Box reduction to a share c of the side, then enlargement; Pillow's bit for bit. Rows are
    cheap to gather and columns are not: columns are handled as rows of the transpose."""
    b, _, h, w = x.shape
    m, n = int(h * c), int(w * c)
    y = shrink(shrink(x.mT.contiguous(), n).mT.contiguous(), m).to(torch.uint8)  # (B,3,m,n)
    y = y.mT.contiguous().index_select(2, box_windows(w, n, 3 * b, x.device)[2])
    return y.mT.contiguous().index_select(2, box_windows(h, m, 3 * b, x.device)[2])


def jpeg_compression(x, c):
    """JPEG at quality c, chroma 4:2:0, by the CPU's codec."""
    out = torch.empty(x.shape, dtype=torch.uint8)
    for image, o in zip(x.cpu(), out):
        pixels = torch.stack(image.unbind(), -1).permute(2, 0, 1)  # as the encoder reads
        o.copy_(decode_jpeg(encode_jpeg(pixels, quality=c)))
    return out.to(x.device)


def equalise(x):
    """Histogram equalisation of (B,1,H,W), whole numbers on 0..255."""
    v, n = x.long().flatten(1), x[0].numel()
    count = x.new_zeros(len(x), 256).scatter_add_(1, v, torch.ones_like(v, dtype=x.dtype))
    first = count.gather(1, v.amin(1, keepdim=True))
    table = ((count.cumsum(1) - first) * (255 / (n - first).clamp(min=1))).round_()
    return torch.where(first == n, v.float(), table.gather(1, v)).view(x.shape)


def neighbours(x, mode):
    """The nine shifted copies of (B,1,H,W), row by row."""
    h, w = x.shape[-2:]
    p = F.pad(x, (1, 1, 1, 1), mode=mode)
    return [p[..., i:i + h, j:j + w] for i in range(3) for j in range(3)]


def box(x):
    """3x3 mean of (B,1,H,W), mirrored about the edge pixel."""
    return slide(slide(F.pad(x, (1, 1, 1, 1), mode="reflect"), [1 / 3] * 3, -1), [1 / 3] * 3, -2)


def distance(mask, reach=20):
    """Euclidean distance to the nearest True of (B,1,H,W), exact to `reach`, `reach` beyond."""
    d = torch.where(mask, 0.0, float(reach))
    for dim, costs in ((2, [(s, s) for s in (1, 2, 4, 8, 16)]),  # any k <= 31 is a sum of these
                       (3, [(1, 2 * k - 1) for k in range(1, reach)])):  # k^2 = 1 + 3 + 5 + ...
        for s, cost in costs:
            n = d.shape[dim] - s
            low, high = d.narrow(dim, 0, n), d.narrow(dim, s, n)
            from_high, from_low = high + cost, low + cost
            torch.minimum(low, from_high, out=low), torch.minimum(high, from_low, out=high)
        d = d.square_() if dim == 2 else d.sqrt_()
    return d


def edges(x):
    """Canny outline of (B,1,H,W), bool: |gx| + |gy| of Sobel over 150, or over 50 and linked."""
    a, b, c, d, _, f, g, h, i = neighbours(x, "replicate")
    gx, gy = c + 2 * f + i - a - 2 * d - g, g + 2 * h + i - a - 2 * b - c
    size, tan = gx.abs() + gy.abs(), math.tan(math.pi / 8)
    a, b, c, d, _, f, g, h, i = neighbours(size, "constant")
    diagonal = torch.where(gx * gy >= 0, (size > a) & (size > i), (size > c) & (size > g))
    peak = torch.where(gx.abs() < tan * gy.abs(), (size > b) & (size >= h), diagonal)
    peak = torch.where(gy.abs() < tan * gx.abs(), (size > d) & (size >= f), peak)
    weak, strong = peak & (size > 50), peak & (size > 150)
    while True:
        grown = weak & (sum(neighbours(strong.float(), "constant")) > 0)
        if torch.equal(grown, strong):
            return strong
        strong = grown


def spatter(x, c, gens):
    """Drops of water (a thickness) or mud (a mask) where smoothed noise is high."""
    mean, std, sigma, threshold, strength, mud = c
    liquid = gaussian(draw(gens, (1, *x.shape[-2:]), torch.Tensor.normal_, mean, std), sigma)
    if mud:
        m = gaussian(liquid > threshold, strength)  # here a second sigma
        m.mul_(m >= 0.8)
        return truncate(x * (1 - m) + m * m.new_tensor([63, 42, 20]).view(3, 1, 1))
    liquid = truncate(liquid * (liquid >= threshold) * 255).float()
    depth = equalise(box(distance(edges(liquid)).clamp_(max=20)).floor_())
    a, b, _, d, e, f, _, h, i = neighbours(depth, "reflect")
    lit = (2 * (i - a) - b - d + e + f + h).clamp_(0, 255)
    m = liquid * box(lit).round_()
    m.mul_(strength / m.amax((2, 3), keepdim=True).clamp_(min=1))
    return truncate(x + m * m.new_tensor([175, 238, 238]).view(3, 1, 1))


def frost_source(folder=None):
    """"original" or "procedural": the textures that frost draws from."""
    return "original" if frost_folder(folder) else "procedural"


FIXED = {"defocus_blur": defocus_blur, "zoom_blur": zoom_blur, "brightness": brightness,
         "contrast": contrast, "pixelate": pixelate, "jpeg_compression": jpeg_compression,
         "gaussian_blur": gaussian_blur, "saturate": saturate}
RANDOM = {"gaussian_noise": gaussian_noise, "shot_noise": shot_noise,
          "impulse_noise": impulse_noise, "glass_blur": glass_blur, "motion_blur": motion_blur,
          "snow": snow, "frost": frost, "fog": fog, "elastic_transform": elastic_transform,
          "speckle_noise": speckle_noise, "spatter": spatter}


def check_corrupt(x, name, severity, index):
    """The identities of the images, a list. Raises: UserError: what was expected and what came."""
    choose(CONSTANTS, str(name), "corruption")
    if not isinstance(severity, (int, np.integer)) or not 1 <= severity <= 5:
        raise UserError(f"severity must be 1, 2, 3, 4 or 5, got {severity!r}")
    if not isinstance(x, torch.Tensor) or x.dtype != torch.uint8:
        came = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise UserError(f"expected images as a uint8 tensor on 0..255, got {came}")
    if x.ndim != 4 or x.shape[1] != 3:
        raise UserError(f"expected images (B,3,H,W), got {tuple(x.shape)}")
    if min(x.shape[2:]) < 32 or max(x.shape[2:]) > 512:
        raise UserError(f"expected sides of 32 to 512 px, got {tuple(x.shape[2:])}")
    index = list(range(len(x))) if index is None else [int(k) for k in index]
    if len(index) != len(x):
        raise UserError(f"{len(x)} images but {len(index)} indices")
    return index


def corrupt(x, name, severity, seed=0, index=None, jpeg=False, frost_dir=None):
    """x corrupted, uint8 (B,3,H,W) on x's device: a function of (x, index, seed, name, severity).

    index: B ints, the identities of the images, by default 0..B-1. jpeg: the round trip at quality
    85 that the published files went through. frost_dir: folder of the original textures. Sides
    of 32 to 512 px. The constants go by the longer side: make_cifar_c.py's up to 48 px,
    make_tinyimagenet_c.py's up to 128, make_imagenet_c.py's above. A GPU draws other numbers.
    Paper: Hendrycks and Dietterich, ICLR 2019. Raises: UserError for any other input."""
    index = check_corrupt(x, name, severity, index)
    (h, w), severity, random = x.shape[-2:], int(severity), RANDOM
    if frost_dir:
        random = RANDOM | {"frost": functools.partial(frost, folder=frost_dir)}
    c = CONSTANTS[name][scale_of(h, w)][severity - 1]
    size = 1 << 21 if name == "zoom_blur" else 1 << 18  # elements that stay in the CPU's cache
    size = size if x.device.type == "cpu" else 1 << 26
    n, out = max(1, size // (3 * h * w)), torch.empty_like(x)
    for i in range(0, len(x), n):
        if name in FIXED:
            y = FIXED[name](x[i:i + n], c)
        else:
            keys = [("corrupt", int(seed), k, name, severity) for k in index[i:i + n]]
            y = random[name](x[i:i + n], c, [rng(*k, device=x.device) for k in keys])
        out[i:i + n] = jpeg_compression(y, 85) if jpeg else y
    return out


# ==== 4. AUGMENTATIONS ====
# In: uint8 (B,3,H,W) on any device, a torch.Generator. Out: uint8 (B,3,H,W), drawn anew for each
# image. Always: a function of (x, generator state), and the global generator stays as it was.
# A CPU generator gives the same draws whatever the device of x, and never waits for a GPU.

PIXELS = ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4))  # ImageNet's mean and deviation, 0..255


def _uniform(generator, *shape):
    """NumPy float64 of the given shape, uniform in [0, 1)."""
    return torch.rand(shape, generator=generator, device=generator.device).cpu().double().numpy()


def _gamma(generator, alpha, *shape):
    """NumPy float64 of the given shape, Gamma(alpha, 1)."""
    full = torch.full(shape, float(alpha), dtype=torch.float64, device=generator.device)
    return torch._standard_gamma(full, generator=generator).cpu().numpy()


def _beta(generator, a, b, *shape):
    """NumPy float64 of the given shape, Beta(a, b)."""
    p, q = _gamma(generator, a, *shape), _gamma(generator, b, *shape)
    return p / (p + q)


def _column(v, x, dtype=torch.float32):
    """NumPy v (N,) as a tensor (N,1,1,1) on the device of x."""
    return torch.from_numpy(v).to(x.device, dtype).view(-1, 1, 1, 1)


def _bytes(x):
    """uint8: x in 0..255, rounded and clipped."""
    return (x + 0.5).clamp_(0, 255).to(torch.int16).to(torch.uint8)  # int16 between: 4 times faster


# The nine operations of AugMix, as PIL does them; each takes x and a level (N,), NumPy float64.


def _histogram(x):
    """(N,3,256) int64: how often each grey level occurs, per image and channel."""
    planes = x.flatten(2).flatten(0, 1)
    if x.device.type == "cpu":
        return torch.stack([p.bincount(minlength=256) for p in planes]).view(-1, 3, 256)
    index, counts = planes.long(), torch.zeros(len(planes), 256, device=x.device).long()
    return counts.scatter_add_(1, index, torch.ones_like(index)).view(-1, 3, 256)


def _lookup(x, table):
    """uint8 like x: table (N,3,256) applied per image and channel."""
    table = table.to(torch.uint8).view(-1, 256)
    planes = x.reshape(len(table), -1)
    if x.device.type == "cpu":  # bytes.translate looks up a byte in under a nanosecond
        done = (p.tobytes().translate(t.tobytes()) for p, t in zip(planes.numpy(), table.numpy()))
        return torch.frombuffer(bytearray(b"".join(done)), dtype=torch.uint8).view(x.shape)
    return table.gather(1, planes.long()).view(x.shape)


def autocontrast(x, level):
    """x stretched per channel so that its darkest value is 0 and its brightest 255."""
    flat, ramp = x.flatten(2), torch.arange(256, device=x.device)
    low, high = flat.amin(2, keepdim=True).double(), flat.amax(2, keepdim=True).double()
    scale = torch.full_like(low, 255) / (high - low)  # 255 / tensor would round twice
    return _lookup(x, torch.where(high > low, (ramp * scale - low * scale).clamp(0, 255), ramp))


def equalize(x, level):
    """x with a flat histogram per channel, by PIL's integer rule."""
    counts = _histogram(x)
    below = counts.cumsum(-1) - counts
    step = below.gather(-1, x.flatten(2).amax(2, keepdim=True).long()) // 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return _lookup(x, torch.where(step > 0, table, torch.arange(256, device=x.device)))


def posterize(x, level):
    """x with its upper 4 - int(0.4 level) bits kept."""
    return x & _column(256 - (16 << (level * 4 / 10).astype(int)), x, torch.uint8)


def solarize(x, level):
    """x with the values from 256 - int(25.6 level) on inverted."""
    over = _column(255 - (level * 256 / 10).astype(int), x, torch.int16) - x  # < 0 where inverted
    return x ^ over.bitwise_right_shift_(15).to(torch.uint8)  # a comparison is several times slower


def rotate(x, level):
    """x turned by int(3 level) degrees about its centre: bilinear, 0 outside."""
    n, _, h, w = x.shape
    turn = np.exp(1j * np.deg2rad((level * 30 / 10).astype(int)))[:, None]
    scale = lambda z: torch.from_numpy((z.real * (2 / w) + z.imag * (2j / h)).astype(np.complex64))
    col = scale((np.arange(w) + 0.5 - w / 2) * turn).to(x.device)[:, None]
    row = scale((np.arange(h) + 0.5 - h / 2) * 1j * turn).to(x.device)[..., None]
    grid = torch.view_as_real(col + row)  # one complex sum is faster than stacking two real ones
    out = F.grid_sample(x.float(), grid, padding_mode="border", align_corners=False)
    u, v = (p(col).contiguous() + p(row).contiguous() for p in (torch.real, torch.imag))
    # 5e-6 because truncation, which PIL does as well, must not turn 199.9999 into 199
    inside = torch.maximum(u.abs_(), v.abs_()).sub_(1).mul_(-1e9).clamp_(0, 1 + 5e-6)
    return out.mul_(inside[:, None]).to(torch.int16).to(torch.uint8)


def _take(views, *index):
    """views[index] for NumPy index arrays."""
    if views.device.type == "cpu":  # NumPy copies whole runs, 5 times faster than torch
        return torch.from_numpy(views.numpy()[index])
    return views[tuple(torch.from_numpy(i).to(views.device) for i in index)]


def _transpose(x):
    """x with rows and columns exchanged, contiguous."""
    if x.device.type == "cpu":  # NumPy needs half of torch's time for bytes
        return torch.from_numpy(np.ascontiguousarray(x.numpy().transpose(0, 1, 3, 2)))
    return x.transpose(2, 3).contiguous()


def shear_x(x, level):
    """x with row r moved left by 0.03 level (r + 1/2) columns: bilinear, 0 outside."""
    n, c, h, w = x.shape
    shift = (level * 0.3 / 10)[:, None] * (np.arange(h) + 0.5)  # (N,H)
    left = np.floor(shift)
    p = min(int(np.abs(left).max()), w) + 2
    padded = F.pad(x, (p, p))
    padded[..., p - 1], padded[..., p + w] = x[..., 0], x[..., -1]  # PIL repeats half a pixel
    start = np.clip(left, -p, p - 1).astype(int)[:, None] + p
    views = padded.unfold(3, w, 1)
    at = np.arange(n)[:, None, None], np.arange(c)[:, None], np.arange(h)
    a, b = _take(views, *at, start).float(), _take(views, *at, start + 1).float()
    out = a.lerp_(b, _column(shift - left, x).view(n, 1, h, 1)).to(torch.int16).to(torch.uint8)
    band = F.pad(x.new_full((w,), 255), (w, w)).unfold(0, w, 1)
    inside = _take(band, np.clip(np.floor(shift + 0.5), -w, w).astype(int) + w)
    return out.bitwise_and_(inside[:, None])


def shear_y(x, level):
    """x with column c moved up by 0.03 level (c + 1/2) rows: bilinear, 0 outside."""
    return _transpose(shear_x(_transpose(x), level))


def _move(rows, step, unit):
    """rows (N,R,P) of image n moved left by step[n] times unit, zeros moving in."""
    p = int(np.abs(step).max())
    views = F.pad(rows, (p * unit, p * unit)).unfold(2, rows.shape[2], unit)
    at = np.arange(rows.shape[0])[:, None], np.arange(rows.shape[1])
    return _take(views, *at, step[:, None] + p)


def translate_x(x, level):
    """x moved left by int(level W / 30) columns."""
    step = (level * (x.shape[3] / 3) / 10).astype(int)
    return _move(x.flatten(1, 2), step, 1).view(x.shape)


def translate_y(x, level):
    """x moved up by int(level H / 30) rows."""
    step = (level * (x.shape[2] / 3) / 10).astype(int)
    return _move(x.flatten(2), step, x.shape[3]).view(x.shape)


GEOMETRIC_OPS = (rotate, shear_x, shear_y, translate_x, translate_y)
OPS = GEOMETRIC_OPS + (autocontrast, equalize, posterize, solarize)  # the rest is in ImageNet-C


def _draw_ops(generator, severity, *shape):
    """Op numbers and levels, NumPy of the given shape; half of the geometric levels negative."""
    op, level, sign = _uniform(generator, 3, *shape)
    op, level = (op * len(OPS)).astype(int), 0.1 + (severity - 0.1) * level
    op[(op == OPS.index(rotate)) & (level < 1 / 3)] = -1  # a turn by int(3 level) = 0 degrees
    return op, np.where((op < len(GEOMETRIC_OPS)) & (sign > 0.5), -level, level)


def _do_ops(views, op, level):
    """A list: views with op[i] at level[i] done to views[i]; op -1 leaves it alone."""
    views = list(views)
    for k in sorted(set(op.tolist()) - {-1}):
        at = [i for i, o in enumerate(op.tolist()) if o == k]
        some = torch.stack([views[i] for i in at]) if len(at) > 1 else views[at[0]][None]
        done = OPS[k](some, level[at])
        for i, image in zip(at, done):
            views[i] = image
    return views


def _chunks(x, size=2**20):
    """Slices of the batch that stay in the cache; on a GPU one slice."""
    n = max(1, size // x[0].numel()) if x.device.type == "cpu" else len(x)
    return [slice(i, i + n) for i in range(0, len(x), n)]


def _mix_chains(x, weights, op, level):
    """x and its chains op, level (N,width,depth) averaged with weights (N, 1 + width)."""
    n, width, depth = op.shape
    views = [image for image in x for _ in range(width)]
    for t in range(depth):
        views = _do_ops(views, op[..., t].ravel(), level[..., t].ravel())
    mixed = torch.full_like(x, 0.5, dtype=torch.float32)  # so that truncation rounds
    for i, w in enumerate(weights.tolist()):
        for view, share in zip((x[i], *views[i * width : (i + 1) * width]), w):
            mixed[i].add_(view, alpha=share)
    return mixed.to(torch.int16).to(torch.uint8)  # int16 between: 4 times faster


def augmix(x, generator, severity=1, width=3, depth=(1, 3), alpha=1.0):
    """x mixed with `width` chains of depth[0] to depth[1] random operations each.

    Paper: AugMix (Hendrycks et al. 2020): severity 1 for ImageNet, 3 for CIFAR.
    Differs: the mixture is rounded to uint8.
    """
    n, (low, high) = len(x), depth
    # METHOD AugMix: (1 - m) x + m sum_k w_k chain_k(x), w ~ Dirichlet(a), m ~ Beta(a, a)
    w, m = _gamma(generator, alpha, n, width), _beta(generator, alpha, alpha, n, 1)
    weights = np.concatenate([1 - m, m * w / w.sum(1, keepdims=True)], 1)
    steps = low + (_uniform(generator, n, width, 1) * (high - low + 1)).astype(int)
    op, level = _draw_ops(generator, severity, n, width, high)
    op = np.where(np.arange(high) < steps, op, -1)
    return torch.cat([_mix_chains(x[s], weights[s], op[s], level[s]) for s in _chunks(x)])


def jsd(logits_clean, logits_aug1, logits_aug2):
    """Scalar float32: Jensen-Shannon consistency of three views, logits (B,C).

    Paper: AugMix, where its weight is 12 and cross-entropy is on the clean view only.
    """
    p = [z.float().softmax(1) for z in (logits_clean, logits_aug1, logits_aug2)]
    log_mean = (sum(p) / 3).clamp(1e-7, 1).log()  # the paper's clamp: no exploding KL
    return sum(F.kl_div(log_mean, q, reduction="batchmean") for q in p) / 3


@functools.lru_cache(maxsize=4)
def fractals(size, n=48, seed=0, points=4096, steps=48, maps=4, grid=192):
    """uint8 (n,3,size,size): flames of random affine maps, a stand-in for PixMix's pictures."""
    g = rng("fractals", seed)
    rand = lambda *shape: torch.rand(n, *shape, generator=g)
    spin = lambda t: torch.stack([t.cos(), -t.sin(), t.sin(), t.cos()], -1).view(n, maps, 2, 2)
    stretch, turn = torch.diag_embed(0.35 + 0.5 * rand(maps, 2)), rand(2, maps) * 6.2832
    linear = spin(turn[:, 0]) @ stretch @ spin(turn[:, 1])  # contracts, so the flame is bounded
    table = torch.cat([linear.flatten(2), rand(maps, 2) * 2 - 1, rand(maps, 3)], 2).flatten(0, 1)
    p, colour, ones = (torch.full((n, points, k), float(k == 1)) for k in (2, 3, 1))
    total, first = torch.zeros(n * grid * grid, 4), torch.arange(n)[:, None]
    for step in range(steps):
        k = first * maps + torch.randint(maps, (n, points), generator=g)
        a, b, c, d, e, f, *rgb = table.index_select(0, k.flatten()).view(n, points, 9).unbind(-1)
        p = torch.stack([a * p[..., 0] + b * p[..., 1] + e, c * p[..., 0] + d * p[..., 1] + f], -1)
        colour = (colour + torch.stack(rgb, -1)) / 2
        if step < 16:  # the points are on their way to the flame
            low, high = p.amin(1, keepdim=True), p.amax(1, keepdim=True)
            continue
        row, col = ((p - low) / (high - low) * grid).long().clamp(0, grid - 1).unbind(-1)
        cell = (first * grid + row) * grid + col
        total.index_add_(0, cell.flatten(), torch.cat([colour, ones], -1).view(-1, 4))
    total = total.view(n, grid, grid, 4).permute(0, 3, 1, 2)
    flame, count = total[:, :3] / total[:, 3:].clamp(min=1), total[:, 3:].log1p()
    ground = F.interpolate(rand(3, 4, 4), (grid, grid), mode="bicubic").clamp(0, 1)
    picture = torch.lerp(ground, flame, (count / count.amax((2, 3), keepdim=True)).sqrt())
    return _bytes(255 * F.interpolate(picture, (size, size), mode="bilinear", antialias=True))


@functools.lru_cache(maxsize=2)
def load_pictures(folder, size, limit=2000):
    """uint8 (M,3,size,size): the first `limit` pictures below a folder, resized and cropped."""
    kinds = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in kinds)[:limit]
    if not paths:
        raise UserError(f"pixmix: no picture in {folder}; give a folder of .jpg or .png files")
    fit = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    return torch.stack([fit(Image.open(p).convert("RGB")) for p in paths])


def _blend(x, y, a, b, multiply):
    """x and y in [0, 1] added (a x + b y about grey) or multiplied (x^a y^b), clipped."""
    a, b = _column(a, x), _column(b, x)
    if multiply:
        return ((2 * x) ** a * (2 * y).clamp(min=1e-37) ** b / 2).clamp(0, 1)
    return (a * x + b * y + (1 - a - b) / 2).clamp(0, 1)


def pixmix(x, generator, severity=1, k=4, beta=3, pictures=None):
    """x mixed 0 to k times with a picture or with an augmented copy of itself.

    pictures: a folder, or None for fractals made here.
    Paper: PixMix (Hendrycks et al. 2022): beta 3 for CIFAR, 4 in its ImageNet code.
    """
    n, _, h, w = x.shape
    size = max(h, w) * 8 // 7
    pool = load_pictures(pictures, size) if pictures else fractals(size)
    crop = _uniform(generator, 3, n) * [[len(pool)], [size - h + 1], [size - w + 1]]
    pictures = [pool[i, :, r : r + h, c : c + w].to(x.device) for i, r, c in crop.astype(int).T]
    op, level = _draw_ops(generator, severity, k + 1, n)
    own, multiply, inner = _uniform(generator, 3, k + 1, n) < 0.5
    op, rounds = np.where(own, op, -1), (_uniform(generator, n) * (k + 1)).astype(int)
    p, q, r = (_beta(generator, *ab, k + 1, n) for ab in ((beta, 1), (1, beta), (1, beta)))
    a, b = np.where(inner, p, 1 + q), np.where(inner, r, -r)
    mixed = torch.stack(_do_ops(x, op[0], level[0])) / 255
    for j in range(1, k + 1):
        for kind in (False, True):
            at = np.flatnonzero((rounds >= j) & (multiply[j] == kind))
            if len(at):
                other = [x[i] if own[j, i] else pictures[i] for i in at]
                other = torch.stack(_do_ops(other, op[j, at], level[j, at])) / 255
                place = torch.from_numpy(at).to(x.device)
                mixed[place] = _blend(mixed[place], other, a[j, at], b[j, at], kind)
    return _bytes(mixed * 255)


def _conv(z, weight, dilation):
    """(N,O,H,W): each image of z (N,C,H,W) under its own weight (N,O,C,K,K), then normalised."""
    n, c, h, w = z.shape
    weight, pad = weight.to(z.device, z.dtype), dilation * (weight.shape[-1] // 2)
    z = F.conv2d(z.reshape(1, n * c, h, w), weight.flatten(0, 1), None, 1, pad, dilation, n)
    return F.instance_norm(z.view(n, -1, h, w))


def _noise_block(z, kernels):
    """(N,3,H,W): z through 1x1, three chained convolutions on quarters of the channels, 1x1."""
    first, *middle, last = kernels
    parts, done, carry = _conv(z, *first).relu_().chunk(4, 1), [], 0
    for part, kernel in zip(parts, middle):
        carry = _conv(part + carry, *kernel).relu_()
        done.append(carry)
    return _conv(torch.cat([*done, parts[3]], 1), *last)


def deepaugment(x, generator, strength=(0.375, 0.75), hidden=16):
    """x through a residual network whose random weights are drawn anew for each image.

    strength: range of the residual's weight; (0.1, 0.3) suits 32 px, where detail drowns sooner.
    Paper: Noise2Net, the on-the-fly relative of DeepAugment (Hendrycks et al. 2021).
    Differs: kernel sizes and dilations are drawn for each batch, strengths for each image.
    """
    draw = lambda *shape: torch.from_numpy(2 * _uniform(generator, len(x), *shape) - 1)
    strength = strength[0] + (strength[1] - strength[0]) * _uniform(generator, len(x))
    mean, std = (x.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in PIXELS)
    blocks, out = [], []
    for sizes in (_uniform(generator, 4, 3, 2) * [2, 3]).astype(int).tolist():
        # kernels of 1 or 3 px at dilation 1 to 3
        middle = [(draw(hidden, hidden, 1 + 2 * k, 1 + 2 * k), 1 + d) for k, d in sizes]
        blocks.append([(draw(4 * hidden, 3, 1, 1), 1), *middle, (draw(3, 4 * hidden, 1, 1), 1)])
    for s in _chunks(x, 2**16):
        z = (x[s] - mean) / std
        for kernels in blocks:
            z = z + _column(strength[s], x) * _noise_block(z, [(w[s], d) for w, d in kernels])
        out.append(_bytes(z * std + mean))
    return torch.cat(out)


def _boxes(generator, n, h, w, share):
    """NumPy bool (n,1,h,w): a box of share[n] of each side, centred anywhere, cut at the border."""
    r, c = (_uniform(generator, 2, n) * [[h], [w]]).astype(int)[..., None]
    half_h, half_w = (share * h / 2).astype(int)[:, None], (share * w / 2).astype(int)[:, None]
    rows = (np.arange(h) >= r - half_h) & (np.arange(h) < r + half_h)
    cols = (np.arange(w) >= c - half_w) & (np.arange(w) < c + half_w)
    return (rows[:, :, None] & cols[:, None, :])[:, None]


def cutout(x, generator, share=0.5):
    """x with a square of `share` of its side in grey (the CIFAR-10 setting: 16 of 32 px)."""
    n, _, h, w = x.shape
    box = torch.from_numpy(_boxes(generator, n, h, w, np.full(n, share))).to(x.device)
    return x.masked_fill(box, 128)


def randaugment(x, generator, num_ops=2, magnitude=9):
    """x under torchvision's RandAugment, image by image."""
    transform = v2.RandAugment(num_ops, magnitude)
    with torch.random.fork_rng(devices=[]):  # it draws from the global generator of the CPU
        torch.default_generator.manual_seed(int(_uniform(generator) * 2**24))
        return torch.stack([transform(image) for image in x])


AUGMENTATIONS = {  # in the order in which a sum applies them
    "none": lambda x, generator: x,
    "deepaugment": deepaugment,
    "pixmix": pixmix,
    "augmix": augmix,
    "randaugment": randaugment,
    "cutout": cutout,
}
LABEL_MIXERS = {"mixup": 0.8, "cutmix": 1.0}  # name: a of Beta(a, a), as in [B]


def spec_names(spec, options=()):
    """The set of names in spec. Raises: UserError for a name that is unknown or stands twice."""
    names, known = spec.split("+"), [*AUGMENTATIONS, *LABEL_MIXERS]
    for name in [*names, *options]:
        if name not in known or names.count(name) > 1:
            raise UserError(f"augmentation {name!r} in {spec!r}: use each name once, of {known}")
    return set(names)


def augment(x, spec, generator, **options):
    """uint8 like x: the augmentations of spec ("a" or "a+b") in the order of AUGMENTATIONS.

    A sum is a sequence: "deepaugment+augmix", in either order, is AugMix on top of DeepAugment, and
    "pixmix+augmix" AugMix on top of PixMix. mixup and cutmix are left to mix_labels.
    options: {name: its keywords}, as augment(x, "augmix", g, augmix={"severity": 3}).
    """
    names = spec_names(spec, options)
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
        raise UserError(f"augment: expected uint8 (B,3,H,W), got {x.dtype} {tuple(x.shape)}")
    for name, function in AUGMENTATIONS.items():
        if name in names and len(x):
            x = function(x, generator, **options.get(name, {}))
    return x


def mix_labels(x, y, spec, generator, n_classes):
    """(x, soft labels (B,n_classes)): each image mixed with its neighbour by mixup or cutmix.

    spec as in augment; with both names each image draws one, with neither y becomes one-hot.
    """
    names = sorted(spec_names(spec) & set(LABEL_MIXERS))
    soft, (n, _, h, w) = F.one_hot(y, n_classes).float(), x.shape
    if not names:
        return x, soft
    which = (_uniform(generator, n) * len(names)).astype(int)
    keep = np.stack([_beta(generator, LABEL_MIXERS[m], LABEL_MIXERS[m], n) for m in names])
    keep = keep[which, np.arange(n)]
    box = _boxes(generator, n, h, w, np.sqrt(1 - keep))
    cut = np.array([m == "cutmix" for m in names])[which][:, None, None, None]
    share = np.where(cut, ~box, keep[:, None, None, None]).astype(np.float32)  # (B,1,H,W)
    x = _bytes(torch.lerp(x.roll(1, 0).float(), x.float(), torch.from_numpy(share).to(x.device)))
    share = torch.from_numpy(share.mean((1, 2, 3))).to(soft.device)[:, None]
    return x, torch.lerp(soft.roll(1, 0), soft, share)


# ==== 5. DATA ====
# In: a set's name.  Out: ImageSet, and batches x uint8 (B,3,H,W), y (B,), index (B,).
# Always: a sample is a function of (seed, epoch, index), the order of (seed, epoch).


def shift_and_flip(x: Tensor, u: np.ndarray) -> Tensor:
    """Each image moved by up to 1/8 of its side (edges reflected) and mirrored half of the time.

    Shapes: x uint8 (B,3,S,S), u (B,3) in [0,1)."""
    b, _, s, _ = x.shape
    pad = s // 8
    at = torch.from_numpy((u[:, :2] * (2 * pad + 1)).astype(np.int64))
    reflect = torch.from_numpy(np.pad(np.arange(s), pad, mode="reflect"))
    rows, cols = (reflect[at[:, i, None] + torch.arange(s)] for i in (0, 1))          # (B,S)
    cols = torch.where(torch.from_numpy(u[:, 2:] < 0.5), cols, cols.flip(1))
    return x[torch.arange(b)[:, None, None], :, rows[:, :, None], cols[:, None, :]] \
        .permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class View:
    """How a picture file becomes a square image to score: the short side resized to size_px /
    crop_pct, the centre cut out; squash = both sides resized, whatever the shape."""
    size_px: int = 224
    crop_pct: float = 0.875
    interpolation: str = "bilinear"
    squash: bool = False

    @property
    def resize_px(self) -> int:
        return math.floor(self.size_px / self.crop_pct)

    def __str__(self) -> str:
        side = "both sides" if self.squash else "short side"
        return f"{side} {self.resize_px}, centre {self.size_px}, {self.interpolation}"

    def __call__(self, im: Image.Image) -> Image.Image:
        size = [self.resize_px] * (2 if self.squash else 1)
        mode = v2.InterpolationMode(self.interpolation)
        im = v2.functional.resize(im, size, interpolation=mode, antialias=True)
        return v2.functional.center_crop(im, self.size_px)


class Project:
    """The outputs of a network that a set scores: z (..., N) -> (..., C), for each class the
    largest of its outputs.

    ids[k]: the output of class k, or the several that mean it (ObjectNet)."""

    def __init__(self, ids: Sequence[int | Sequence[int]]):
        many = [[i] if isinstance(i, int) else list(i) for i in ids]
        wide = max(map(len, many))
        self.ids = torch.tensor([m + m[:1] * (wide - len(m)) for m in many])          # (C,wide)

    def winners(self, z: Tensor) -> Tensor:
        """Index into the N outputs of the one that speaks for each class, (..., C)."""
        ids = self.ids.to(z.device)
        if ids.shape[1] == 1:
            return ids[:, 0].expand(*z.shape[:-1], -1)
        best = z[..., ids].argmax(-1, keepdim=True)                                  # (..., C, 1)
        return ids.expand(*best.shape[:-1], -1).gather(-1, best)[..., 0]

    def __call__(self, z: Tensor) -> Tensor:
        return z[..., self.ids.to(z.device)].amax(-1)


def read_picture(path: Path | str, border_px: int = 0) -> Image.Image:
    """The picture in RGB, border_px cut off on each side.  Raises: UserError."""
    try:
        with Image.open(path) as im:
            im = im.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UserError(f"cannot read the image {path} ({e}): mend or remove it") from None
    return ImageOps.crop(im, border_px) if border_px else im


class ImageSet(torch.utils.data.Dataset):
    """Labelled square images, held in memory (uint8) or read from files.

    y: labels (n,).  project: the network's outputs that this set scores; None = all.
    view: how files become squares.  border_px: cut off on each side before (ObjectNet's frame).
    captions: a sentence about each image, where there are some.  names: of the classes, in prompts.
    train: crops and flips at random instead of the view.
    made: "disk" or "regenerated" of a -c set, else "".  cells_dir: its archive, for open_cell.
    partial: the number of images is not the published one."""

    def __init__(self, name: str, y, classes: Sequence[str], view: View = View(), *, images=None,
                 paths=None, project: Project | None = None, border_px: int = 0,
                 expected: int = 0, source: str = "", captions: Sequence[str] = ()):
        self.name, self.classes, self.view, self.border_px = name, list(classes), view, border_px
        self.y, self.images, self.paths = np.asarray(y, np.int64), images, paths
        self.project, self.expected, self.source = project, expected, source
        self.captions, self.names = list(captions), list(classes)
        self.index = np.arange(len(self.y))           # which of the set's images are in use
        self.train, self.seed = False, 0
        self.made, self.cells_dir, self.partial, self.allow_partial = "", None, False, False

    def __len__(self) -> int:
        return len(self.index)

    @property
    def transform(self) -> str:
        """What happens to an image before it is scored, as recorded in the results."""
        if self.images is not None:
            stored, size = self.images.shape[-1], self.view.size_px
            return f"as stored, {stored} px" + f", resized to {size} px" * (size != stored)
        return (f"cut {self.border_px} px, " if self.border_px else "") + str(self.view)

    def subset(self, n: int) -> ImageSet:
        """The same set with at most n of its images (0 = all), drawn by a fixed seed: of fewer the
        same ones."""
        out = copy.copy(self)
        if 0 < n < len(self):
            order = np.random.default_rng(fold("subset", self.name)).permutation(len(self.y))
            out.index = np.sort(order[np.isin(order, self.index)][:n])
        return out

    def only(self, keep: Sequence[int]) -> ImageSet:
        """The images of some classes, labelled by their places in keep."""
        out, place = copy.copy(self), np.full(len(self.classes), -1)
        place[list(keep)] = np.arange(len(keep))
        out.y = place[self.y]
        out.index = self.index[out.y[self.index] >= 0]
        out.classes, out.names = ([words[k] for k in keep] for words in (self.classes, self.names))
        out.expected = len(out.index)
        return out

    def captioned(self) -> ImageSet:
        """The same images, with their distinct captions as classes; without captions the prompts
        of their classes."""
        lines = self.captions or [f"a photo of a {self.names[k]}." for k in self.y]
        out = copy.copy(self)
        classes, out.y = np.unique(lines, return_inverse=True)
        out.classes = classes.tolist()
        return out

    def training(self, seed: int) -> ImageSet:
        """The same set with random crops and flips, functions of (seed, epoch, index)."""
        out = copy.copy(self)
        out.train, out.seed = True, seed
        return out

    def __getitems__(self, keys: Sequence[tuple[int, int]]):
        """Batch (x uint8 (B,3,H,W), y (B,), index (B,)) for keys (epoch, position)."""
        epochs = np.array([e for e, _ in keys])
        index = self.index[[p for _, p in keys]]
        if self.images is None:
            x = torch.stack([self._read(int(e), int(i)) for e, i in zip(epochs, index)])
        else:
            x = self.images[torch.from_numpy(index)]
            if x.shape[-1] != self.view.size_px:
                x = v2.functional.resize(x, [self.view.size_px] * 2, antialias=True)
            if self.train:
                x = shift_and_flip(x, uniforms(fold(self.seed, "crop", int(epochs[0])), index, 3))
        return x, torch.from_numpy(self.y[index]), torch.from_numpy(index)

    def _read(self, epoch: int, i: int) -> Tensor:
        im = read_picture(self.paths[i], self.border_px)
        if not self.train:
            return v2.functional.pil_to_tensor(self.view(im))
        with torch.random.fork_rng(devices=[]):       # torchvision draws from the global generator
            torch.manual_seed(fold(self.seed, "crop", epoch, i))
            mode = v2.InterpolationMode(self.view.interpolation)
            im = v2.RandomResizedCrop(self.view.size_px, interpolation=mode, antialias=True)(im)
            return v2.functional.pil_to_tensor(v2.RandomHorizontalFlip()(im))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def subfolders(folder: Path | str) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones and __MACOSX are passed over."""
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not _hidden(e.name))


def pictures(folder: Path | str) -> list[str]:
    """Paths of the image files below a folder, sorted folder by folder; hidden ones likewise."""
    kinds, out = torchvision.datasets.folder.IMG_EXTENSIONS, []
    for top, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not _hidden(f))
        out += [os.path.join(top, f) for f in sorted(files)
                if f.lower().endswith(kinds) and not _hidden(f)]
    return out


def scan(folder: Path) -> tuple[list[str], list[int], list[str]]:
    """(paths, labels, class names) of a class-per-folder tree, everything in sorted order."""
    classes = subfolders(folder) if Path(folder).is_dir() else []
    if not classes:
        raise UserError(f"no class folders in {folder}: expected {folder}/CLASS/IMAGE")
    if len(classes) < 2:
        raise UserError(f"{folder} holds one class folder ({classes[0]}), a classifier needs two "
                        f"or more: expected {folder}/CLASS/IMAGE")
    found = [pictures(Path(folder) / c) for c in classes]
    empty = [c for c, files in zip(classes, found) if not files]
    if empty:
        raise UserError(f"{folder}: no image in the class folder {empty[0]} ({len(empty)} such)")
    return [p for f in found for p in f], [k for k, f in enumerate(found) for _ in f], classes


def extended(images: ImageSet, folders: str) -> ImageSet:
    """The set and the images of more trees of the same class folders, joined by commas."""
    out = copy.copy(images)
    for folder in filter(None, folders.split(",")):
        paths, y, classes = scan(Path(folder))
        if images.paths is None or set(classes) - set(images.classes):
            raise UserError(f"robustify.extra: {folder} has other class folders than {images.name}")
        more = np.array([images.classes.index(classes[k]) for k in y])
        out.index = np.concatenate([out.index, len(out.y) + np.arange(len(more))])
        out.paths, out.y = [*out.paths, *paths], np.concatenate([out.y, more])
    return out


def _ignore_signals(_) -> None:
    """Leaves Ctrl-C and SIGTERM to the parent, which stops its workers when it is ready."""
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, signal.SIG_IGN)


def _kill_workers() -> None:
    """At exit, ends workers whose iterator is still held, by a traceback for example: Python would
    wait for ever for the effect of a SIGTERM, which they ignore."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)        # torch's handler reports it as a crash
    for process in torch.multiprocessing.active_children():
        if process.daemon:
            process.kill()


class Batches:
    """Batch sampler of training: the global order of (seed, epoch), this rank's share of it.

    Yields lists of (epoch, position) from micro-batch `start` on, without end."""

    def __init__(self, n: int, batch: int, seed: int, start: int = 0):
        rank, size = world()
        if batch % size:
            raise UserError(f"a batch of {batch} images cannot be shared by {size} processes")
        if n < batch:
            raise UserError(f"{n} training images are fewer than a batch of {batch}")
        self.n, self.batch, self.seed, self.start = n, batch, seed, start
        self.share = slice(rank * batch // size, (rank + 1) * batch // size)
        self.per_epoch = n // batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, k = divmod(self.start, self.per_epoch)
        while True:
            order = np.random.default_rng(fold(self.seed, "order", epoch)).permutation(self.n)
            for k in range(k, self.per_epoch):
                picks = order[k * self.batch:(k + 1) * self.batch][self.share]
                yield [(epoch, int(i)) for i in picks]
            epoch, k = epoch + 1, 0


def forked(jobs, workers: int, **options) -> torch.utils.data.DataLoader:
    """DataLoader whose workers leave signals to this process and end with it, however it ends."""
    if workers:
        atexit.unregister(_kill_workers)                 # once, and before multiprocessing's own
        atexit.register(_kill_workers)
    return torch.utils.data.DataLoader(
        jobs, num_workers=workers, collate_fn=lambda batch: batch, worker_init_fn=_ignore_signals,
        multiprocessing_context="fork" if workers else None, **options)


def loader(images: ImageSet, sampler, workers: int) -> torch.utils.data.DataLoader:
    """DataLoader of whole batches; the number of workers changes no sample."""
    return forked(images, 0 if images.images is not None else workers, batch_sampler=sampler,
                  pin_memory=torch.cuda.is_available())


def eval_batches(images: ImageSet, batch: int, workers: int = 0):
    """This rank's batches of the whole set, in order: every world-size-th batch, nothing padded.

    A rank without any gets the first one.  A batch holds the same images for any number of
    processes, so figures agree to the last bit."""
    rank, size = world()
    starts = list(range(rank * batch, len(images), batch * size)) or [0]
    return loader(images, [[(0, p) for p in range(s, min(s + batch, len(images)))]
                           for s in starts], workers)


@dataclass(frozen=True)
class SetRow:
    """A row of the table of sets: how it is opened, what it should hold, how to get it.

    Folders are below data.root; their case does not matter, nor - and _.  All sets are scored by
    top-1 over their own classes, those with a part over these outputs of an ImageNet network."""
    name: str
    open: Callable                # (row, data, split, view) -> ImageSet
    n_train: int                  # published number of training images, 0 = no such split
    n_test: int                   # published number of test images
    n_classes: int
    get: str
    folders: tuple[str, ...] = ()
    train: tuple[str, ...] = ()   # the training half in a folder; a+b = both, /a = in data.root
    test: tuple[str, ...] = ("",)
    part: str = ""                # the classes of ImageNet that are scored: "a", "r", "objectnet"
    view: View | None = None      # the set's own, whatever the network's
    archive: tuple[str, ...] = ()                 # folders of its published -c copy


# ---- shapes: a procedural set --------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "half disc",
          "arrow")


def _shape_distance(k: int, x: Tensor, y: Tensor) -> Tensor:
    """Signed field of shape k, negative inside, on coordinates of about -1..1 (y up)."""
    r, a = torch.hypot(x, y), torch.atan2(x, y)

    def box(cy: float, w: float, h: float) -> Tensor:
        return torch.maximum(x.abs() - w, (y - cy).abs() - h)

    third = 2 * math.pi / 3
    return (
        lambda: r - 0.8,
        lambda: box(0, 0.7, 0.7),
        lambda: r * torch.cos(torch.remainder(a, third) - third / 2) - 0.48,
        lambda: r - 0.42 - 0.52 * (torch.remainder(a, 0.4 * math.pi) * 5 / math.pi - 1).abs(),
        lambda: torch.minimum(box(0, 0.85, 0.27), box(0, 0.27, 0.85)),
        lambda: (r - 0.62).abs() - 0.2,
        lambda: torch.maximum(r - 0.85, 0.7 - torch.hypot(x - 0.45, y)),
        lambda: torch.minimum(torch.hypot(x.abs() - 0.4, y - 0.3) - 0.44, torch.maximum(
            (x.abs() * 1.1 - y - 0.8) * 0.67, y - 0.3)),
        lambda: torch.maximum(r - 0.9, -y - 0.15),
        lambda: torch.minimum(torch.maximum(x.abs() + y - 0.85, 0.05 - y), box(-0.4, 0.22, 0.5)),
    )[k]()


def _blotches(u: Tensor, s: int) -> Tensor:
    """Smooth random field (B,1,s,s) in 0..1 from u (B,n*n)."""
    n = math.isqrt(u.shape[1])
    return F.interpolate(u.view(-1, 1, n, n), size=(s, s), mode="bicubic").clamp(0, 1)


def _texture(u: Tensor, blot: Tensor, gx: Tensor, gy: Tensor) -> Tensor:
    """Pattern (B,s,s) in 0..1, one of stripes, checks, blotches or plain, from u (B,5)."""
    angle, freq = u[:, 0, None, None] * math.pi, 3 + 9 * u[:, 1, None, None]
    p, q = gx * angle.cos() + gy * angle.sin(), gy * angle.cos() - gx * angle.sin()
    wave = torch.sin(freq * p + 6 * u[:, 2, None, None])
    checks = (wave * torch.sin(freq * q) * 4).clamp(-1, 1)
    kind = (u[:, 3] * 4).long()[:, None, None]
    stripes = (wave * 3).clamp(-1, 1)
    pattern = torch.where(kind == 0, stripes, torch.where(kind == 1, checks, 2 * blot - 1))
    return torch.where(kind == 3, torch.zeros(()), pattern) * 0.5 + 0.5


def _shape_colours(u: Tensor) -> tuple[Tensor, Tensor]:
    """Colours (B,3) of shape and ground from u (B,128)."""
    fore, back = u[:, 5:8], u[:, 8:11]
    near = (fore - back).norm(dim=1, keepdim=True) < 0.5  # else shape and ground look alike
    return torch.where(near, (back + 0.5) % 1.0, fore), back


def _render_shapes(u: Tensor, k: int, size: int, style: str) -> Tensor:
    """uint8 images (B,3,size,size) of shape k from u (B,128): the nuisances are colour, texture,
    background, light, scale, rotation, place and occlusion."""
    s, col = 2 * size, lambda i: u[:, i, None, None]                                   # noqa: E731
    g = (torch.arange(s) + 0.5) / s * 2 - 1
    gy, gx = torch.meshgrid(-g, g, indexing="ij")
    turn, scale = (col(0) - 0.5) * 1.2, 0.5 + 0.4 * col(1)
    dx, dy = gx - (col(2) - 0.5) * 0.5, gy - (col(3) - 0.5) * 0.5
    x, y = dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()
    d = _shape_distance(k, x / scale, y / (scale * (0.8 + 0.4 * col(4))))
    fore, back = _shape_colours(u)
    blot = _blotches(u[:, 64:128], s)[:, 0]
    inside = (d < 0).float()
    if style == "r":                                     # drawings: lines and hatching on paper
        tone, ink = 0.75 + 0.25 * back, 0.45 * fore
        swap = u[:, 11:12] < 0.3
        tone, ink = torch.where(swap, ink, tone), torch.where(swap, tone, ink)
        line = (d.abs() < 0.07 + 0.1 * col(12)).float()
        hatch = inside * (torch.sin((gx + gy) * (20 + 20 * col(13))) > 0.3) * (col(14) < 0.5)
        mask = torch.maximum(line, torch.maximum(hatch, inside * (col(14) > 0.85)))
        img = tone[..., None, None] + (ink - tone)[..., None, None] * mask[:, None]
    else:
        paint = lambda c, i, j: c[..., None, None] + 0.4 * (                           # noqa: E731
            u[:, j:j + 3] - c)[..., None, None] * _texture(u[:, i:i + 5], blot, gx, gy)[:, None]
        img = paint(back, 15, 20)
        for o in (24, 30):                               # clutter behind the shape
            spot = torch.hypot(gx - 2 * col(o) + 1,
                               gy - 2 * col(o + 1) + 1) < 0.1 + 0.2 * col(o + 2)
            img = torch.where(spot[:, None], u[:, o + 3:o + 6, None, None], img)
        img = torch.where(inside[:, None] > 0, paint(fore, 36, 41), img)
        a = col(45) * math.pi                            # a bar in front of a third of them
        bar = ((gx * a.cos() + gy * a.sin() - 0.8 * (col(46) - 0.5)).abs() < 0.09) & (col(47) < .35)
        img = torch.where(bar[:, None], u[:, 48:51, None, None], img)
        light = 1 + 0.5 * (col(51) - 0.5) * gx + 0.5 * (col(52) - 0.5) * gy
        img = img * light[:, None] * (0.75 + 0.4 * u[:, 53, None, None, None])
    return (F.avg_pool2d(img.clamp(0, 1), 2) * 255).to(torch.uint8)


def make_shapes(n: int, size: int, split: str, style: str = "") -> tuple[Tensor, np.ndarray]:
    """(x uint8 (n,3,size,size), y (n,)): image i is a function of (split, style, i) alone."""
    y = np.arange(n) % len(SHAPES)
    x = torch.empty(n, 3, size, size, dtype=torch.uint8)
    for k in range(len(SHAPES)):
        for at in torch.from_numpy(np.flatnonzero(y == k)).split(64):
            u = torch.from_numpy(uniforms(fold("shapes", split, style), at.numpy(), 128))
            x[at] = _render_shapes(u, k, size, style)
    return x, y


NAMED_COLOURS = {"black": (0, 0, 0), "white": (1, 1, 1), "grey": (.5, .5, .5),
                 "red": (.9, .1, .1), "green": (.1, .8, .1), "blue": (.1, .1, .9),
                 "yellow": (.9, .9, .1), "cyan": (.1, .9, .9), "purple": (.6, .1, .8),
                 "pink": (.95, .5, .75), "orange": (1, .55, .1), "brown": (.5, .3, .1)}
TEXTURES = ("striped", "checked", "blotchy", "plain")          # in the order of _texture's kinds
CAPTIONS = (*["a photo of a {shape}."] * 2, "a photo of a {texture} {shape}.",
            "a photo of a {colour} {texture} {shape}.")


def caption_shapes(n: int, split: str) -> list[str]:
    """What one would write under image i of make_shapes(n, ..., split): its shape, in some of them
    the nearest name of its colour and its texture; a function of (split, i) alone."""
    u = torch.from_numpy(uniforms(fold("shapes", split, ""), np.arange(n), 128))
    colour = 0.8 * _shape_colours(u)[0] + 0.2 * u[:, 41:44]        # the texture's mean
    near = torch.cdist(colour, torch.tensor(list(NAMED_COLOURS.values()), dtype=u.dtype)).argmin(1)
    kind, form = (u[:, 39] * 4).long(), (u[:, 63] * len(CAPTIONS)).long()
    return [CAPTIONS[f].format(shape=SHAPES[i % len(SHAPES)], colour=list(NAMED_COLOURS)[c],
                               texture=TEXTURES[t])
            for i, (f, c, t) in enumerate(zip(form.tolist(), near.tolist(), kind.tolist()))]


def _open_shapes(row: SetRow, data: Data, split: str, view: View) -> ImageSet:
    size, n = data.size_px or 32, row.n_train if split == "train" else row.n_test
    n = min(n, (data.n_train if split == "train" else data.n_test) or n)
    x, y = make_shapes(n, size, split, "r" if row.name == "shapes-r" else "")
    captions = caption_shapes(n, split) if split == "train" else ()
    return ImageSet(row.name, y, SHAPES, View(size), images=x, expected=n, source="procedural",
                    captions=captions)


# ---- sets from disk ------------------------------------------------------------------------------

def absent(row: SetRow, data: Data, split: str = "test") -> Absent:
    """The error of a set that is not there: where it was looked for, what to put there."""
    where = " or ".join(str(Path(data.root) / f) for f in row.folders)
    n, half = (row.n_train, "training") if split == "train" else (row.n_test, "test")
    what = f"the training half of {row.name} ({', '.join(row.train)})" * (split == "train")
    return Absent(f"{what or row.name} is not there: looked for {where}; expected {n:,} {half} "
                  f"images of {row.n_classes} classes; get it: "
                  f"{row.get.replace('ROOT', data.root)}; another place: data.root=FOLDER")


def locate(root: Path | str, folders: Sequence[str]) -> Path | None:
    """The first of the folders that is below root: case, - and _ do not matter, and A/A is for A
    where an archive was unpacked in a folder of its own name."""
    def alike(top: Path, name: str) -> list[Path]:
        plain = lambda n: re.sub(r"[-_ ]", "", n.lower())                              # noqa: E731
        found = [n for n in subfolders(top) if plain(n) == plain(name)]
        return [top / n for n in sorted(found, key=lambda n: n != name)]  # the very name first
    for folder in folders:
        tops = [Path(root)] if Path(root).is_dir() else []
        for part in Path(folder).parts:
            tops = [q for t in tops for p in alike(t, part) for q in (*alike(p, part), p)]
        if tops:
            return tops[0]
    return None


def split_folders(row: SetRow, data: Data, split: str) -> list[Path]:
    """The folders that hold a split, as a rule one.  Raises: Absent."""
    for folder in row.folders:
        for half in row.train if split == "train" else row.test:
            names = [h[1:] if h.startswith("/") else f"{folder}/{h}" for h in half.split("+")]
            tops = [locate(data.root, [n]) for n in names]
            if all(tops):
                return tops
    raise absent(row, data, split)


def class_folders(top: Path, names: Sequence[str], numbers: bool = False,
                  others: bool = False) -> tuple[list[str], list[int]]:
    """(paths, labels) of class folders.  The label comes from the folder's name: its place in
    `names`, or (numbers) the number itself, never its place in the text order.

    others: folders of other classes are passed over.  Raises: UserError where they are not."""
    place, paths, y = {n: k for k, n in enumerate(names)}, [], []
    for folder in subfolders(top):
        number = int(folder) if numbers and folder.isdecimal() else -1
        label = place.get(folder, number if number < len(names) else -1)
        found = [] if label < 0 and others else pictures(top / folder)
        if label < 0 and found:
            raise UserError(f"{top}: the folder {folder} is none of its {len(names)} classes "
                            f"({names[0]}, {names[1]}, ...)")
        paths += found
        y += [label] * len(found)
    return paths, y


def complete(images: ImageSet, allow_partial: bool) -> ImageSet:
    """The set, marked where it is partial.  Raises: UserError where that is not allowed."""
    n, want = len(images.y), images.expected
    if not n:
        raise UserError(f"{images.name}: no image in {images.source}, expected {want:,}")
    if want and n != want and not allow_partial:
        raise UserError(f"{images.name}: {n:,} images in {images.source}, expected {want:,}: it is "
                        "incomplete or holds more; unpack it again, or data.allow_partial=true to "
                        "use it as it is")
    images.partial, images.allow_partial = bool(want) and n != want, allow_partial
    return images


def _open_torchvision(row: SetRow, data: Data, split: str, view: View) -> ImageSet:
    """Fashion-MNIST (28 px, padded to 32) and CIFAR through torchvision's own classes."""
    cls = {"fashion-mnist": torchvision.datasets.FashionMNIST,
           "cifar10": torchvision.datasets.CIFAR10,
           "cifar100": torchvision.datasets.CIFAR100}[row.name]
    top = locate(data.root, row.folders)
    if top is None:
        raise absent(row, data)
    root = top.parents[len(Path(row.folders[0]).parts) - 1]
    try:
        raw = cls(root, train=split == "train", download=False)
    except RuntimeError:
        raise UserError(f"{top} is incomplete: {row.get.replace('ROOT', str(root))}") from None
    x = torch.as_tensor(raw.data)
    x = (F.pad(x, (2, 2, 2, 2))[:, None].expand(-1, 3, -1, -1) if x.ndim == 3
         else x.permute(0, 3, 1, 2))
    n = row.n_train if split == "train" else row.n_test
    return ImageSet(row.name, raw.targets, raw.classes, View(data.size_px or x.shape[-1]), images=x,
                    expected=n, source=str(root))


def _open_folder(name: str, split: str, view: View) -> ImageSet:
    """folder:PATH with PATH/train and PATH/val (or test), or, to score only, PATH itself."""
    root = Path(name.partition(":")[2])
    if not root.is_dir():
        raise UserError(f"no folder {root}: folder:PATH takes a class-per-folder tree")
    halves = [root / s for s in (("train",) if split == "train" else ("val", "test"))]
    found = [h for h in halves if h.is_dir()]
    if not found and (split == "train" or (root / "train").is_dir()):
        raise UserError(f"{root}: no folder {halves[0].name}; training takes "
                        f"{root}/train/CLASS/IMAGE and {root}/val/CLASS/IMAGE")
    paths, y, classes = scan(found[0] if found else root)
    return ImageSet(name, y, classes, view, paths=paths, source=str(root))


# ---- the ImageNet family -------------------------------------------------------------------------

# ObjectNet's 113 folders that are ImageNet classes too, and these classes' outputs (125).  Source:
# objectnet_to_imagenet_1k.json of objectnet-1.0/mappings.
OBJECTNET: dict[str, list[int]] = {item.split()[0]: list(map(int, item.split()[1:])) for item in """
    alarm_clock 409 530, backpack 414, banana 954, band_aid 419, basket 790, beer_bottle 440,
    bench 703, bicycle 444 671, binder_closed 446, bottle_cap 455, bread_loaf 930, broom 462,
    bucket 463, butchers_knife 499, can_opener 473, candle 470, cellphone 487, chair 423 559 765,
    clothes_hamper 588, coffee_french_press 550, combination_lock 507, computer_mouse 673,
    desk_lamp 846, doormat 539, dress 578, dress_shoe_men 630, drill 740, drinking_cup 968,
    drying_rack_for_dishes 729, envelope 549, fan 545, frying_pan 567, full_sized_towel 434,
    hair_dryer 589, hammer 587, hand_towel_or_rag 533, helmet 518 560, iron_for_clothes 606,
    jeans 608, keyboard 508, ladle 618, lampshade 619, laptop_open 620, lemon 951,
    letter_opener 623, lighter 626, lipstick 629, match 644, measuring_cup 647, microwave 651,
    mixing_salad_bowl 659, monitor 664, mug 504, nail_fastener 677, necklace 679, orange 950,
    padlock 695, paintbrush 696, paper_towel 700, pen 418 563 749, pill_bottle 720, pillow 721,
    pitcher 725, plastic_bag 728, plate 923, plunger 731, pop_can 737, portable_heater 811,
    printer 742, remote_control 761, ruler 769, running_shoe 770, safety_pin 772, salt_shaker 773,
    sandal 774, screw 783, shovel 792, skirt 601 655 689, sleeping_bag 797, soap_dispenser 804,
    sock 806, soup_bowl 809, spatula 813, speaker 632, still_camera 732 759, strainer 828,
    stuffed_animal 850, suit_jacket 834, sunglasses 837, sweater 841, swimming_trunks 842,
    t-shirt 610, teapot 849, tennis_racket 752, tie 457 906, toaster 859, toilet_paper_roll 999,
    trash_bin 412, tray 868, tv 851, umbrella 879, vacuum_cleaner 882, vase 883, wallet 893,
    watch 531, water_bottle 898, weight_exercise 543, weight_scale 778, wheel 479 694,
    whistle 902, wine_bottle 907, winter_glove 658, wok 909
""".split(",")}


@functools.cache
def synsets(part: str = "") -> tuple[str, ...]:
    """ImageNet's 1000 synsets in label order; part "a" or "r": the 200 of ImageNet-A or -R."""
    import timm
    file = (Path(timm.__file__).parent / "data/_info"
            / f"imagenet_{part + '_' if part else ''}synsets.txt")
    return tuple(file.read_text().split())


PARTS = ("a", "r", "objectnet")


def part_classes(part: str) -> tuple[tuple[str, ...], Project | None]:
    """(class names, the outputs that mean them) of a part of ImageNet; "" = all 1000."""
    if part == "objectnet":
        return tuple(OBJECTNET), Project(list(OBJECTNET.values()))
    place = {s: k for k, s in enumerate(synsets())}
    return synsets(part), Project([place[s] for s in synsets(part)]) if part else None


def _loadmat(path: Path, instead: str) -> dict:
    """Content of a MATLAB file.  instead: what does without it."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{path} needs scipy: pip install scipy, or {instead}") from None
    try:
        return loadmat(path, squeeze_me=True)
    except OSError:
        raise UserError(f"no file {path}: unpack it there, or {instead}") from None


TRUTH = ("LOC_val_solution.csv", "val.txt", "imagenet_2012_validation_synset_labels.txt",
         "synset_labels.txt", "ILSVRC2012_validation_ground_truth.txt")


def _val_truth(file: Path) -> dict[str, int]:
    """{name of an ImageNet validation image, no suffix: label} by a public ground-truth file.

    Lines "NAME LABEL", or LABEL alone in the order of the images.  LABEL: a synset, its place in
    the sorted synsets from 0, or in the devkit's file an ILSVRC2012_ID, which is another order
    (n02119789 is 1) that only its meta.mat tells."""
    place = {s: k for k, s in enumerate(synsets())}
    label = place | {str(k): k for k in place.values()}
    if file.name == TRUTH[-1]:
        meta = _loadmat(file.with_name("meta.mat"), f"put {', '.join(TRUTH[:-1])} there instead")
        label = {str(int(s["ILSVRC2012_ID"])): place[str(s["WNID"])] for s in meta["synsets"]
                 if str(s["WNID"]) in place}
    truth = {}
    for line in file.read_text().splitlines():
        words = re.split(r"[,\s]+", line.strip())
        name, word = words[:2] if len(words) > 1 else (
            f"ILSVRC2012_val_{len(truth) + 1:08d}", words[0])
        if name == "ImageId" or not word:                         # Kaggle's head, an empty line
            continue
        if word not in label:
            raise UserError(f"{file}: {word} is no label of ImageNet (a synset, or 0 to 999)")
        truth[Path(name).stem] = label[word]
    return truth


def _flat_val(top: Path, root: Path) -> tuple[list[str], list[int]]:
    """(paths, labels) of ImageNet's validation images in one folder: by the synset at the end of
    their names, or by a ground-truth file there or above, up to the root of the data.  Sorted as
    class folders would be, so that an image has the same index in either layout."""
    paths, place = pictures(top), {s: k for k, s in enumerate(synsets())}
    ends = [re.search(r"_(n\d{8})$", Path(p).stem) for p in paths]
    if paths and all(ends):
        y, paths = zip(*sorted((place[e[1]], p) for e, p in zip(ends, paths)))
        return paths, y
    tops = [t / s for t in (top, *(p for p in top.parents if p == root or root in p.parents))
            for s in ("", "data", "ILSVRC2012_devkit_t12/data", "devkit/data", "caffe_ilsvrc12")]
    file = next((t / name for name in TRUTH for t in tops if (t / name).is_file()), None)
    if file is None:
        raise UserError(f"{top} holds no class folders: sort its images into folders named by "
                        f"synset, or put one of {', '.join(TRUTH)} there")
    truth = _val_truth(file)
    lost = [p for p in paths if Path(p).stem not in truth]
    if lost:
        raise UserError(f"{file} does not name {lost[0]} ({len(lost)} such)")
    y, paths = zip(*sorted((truth[Path(p).stem], p) for p in paths)) if paths else ((), ())
    return paths, y


def _open_imagenet(row: SetRow, data: Data, split: str, view: View) -> ImageSet:
    """A set of the ImageNet family."""
    names, project = part_classes(row.part)
    top, n = split_folders(row, data, split)[0], row.n_train if split == "train" else row.n_test
    if top.is_dir() and all(f.lower().startswith("imagenetv2") for f in subfolders(top) or [""]):
        raise absent(row, data)                        # a folder that holds other variants of V2
    if row.name == "imagenet" and split == "test" and not subfolders(top):
        paths, y = _flat_val(top, Path(data.root))
    else:
        paths, y = class_folders(top, names, len(names) == 1000, others=row.part == "objectnet")
    return ImageSet(row.name, y, names, view, paths=paths, project=project, expected=n,
                    border_px=2 if row.part == "objectnet" else 0, source=str(top))


def of_part(images: ImageSet, part: str) -> ImageSet:
    """The images of the classes of a part of ImageNet, scored over these classes alone."""
    names, project = part_classes(part)
    label = {i: k for k, ids in enumerate(project.ids.tolist()) for i in ids}
    keep = [n for n, y in enumerate(images.y.tolist()) if y in label]
    out = ImageSet(f"{images.name}@{part}", [label[y] for y in images.y[keep].tolist()], names,
                   images.view, paths=[images.paths[n] for n in keep], project=project,
                   expected=images.expected // 1000 * len(label), source=images.source)
    return complete(out, images.allow_partial)


# ---- transfer sets -------------------------------------------------------------------------------

Listing = tuple[list[tuple[str, int]], Sequence[str]]        # ((path, label) pairs, class names)


def _listed_flowers(top: Path, split: str) -> Listing | None:
    """torchvision's layout.  Training = the official train and val, as in CLIP's linear probes."""
    if not (top / "jpg").is_dir():
        return None
    other = f"class folders {top}/train, val and test"
    y = _loadmat(top / "imagelabels.mat", other)["labels"]
    ids = _loadmat(top / "setid.mat", other)
    ids = [*ids["trnid"], *ids["valid"]] if split == "train" else ids["tstid"]
    names = torchvision.datasets.Flowers102.classes
    return [(f"{top}/jpg/image_{i:05d}.jpg", int(y[i - 1]) - 1) for i in ids], names


def _listed_sun(top: Path, split: str) -> Listing | None:
    """The first of the ten official partitions, 50 + 50 images a class."""
    file = "Training_01.txt" if split == "train" else "Testing_01.txt"
    lists = next((d for d in (top, top / "Partitions", top.parent, top.parent / "Partitions")
                  if (d / file).is_file() and (d / "ClassName.txt").is_file()), None)
    if lists is None:
        return None
    classes = (lists / "ClassName.txt").read_text().split()       # /a/abbey
    place = {c: k for k, c in enumerate(classes)}
    lines = (lists / file).read_text().split()
    return [(f"{top}{p}", place[p.rpartition("/")[0]]) for p in lines], [c[3:] for c in classes]


def _listed_places(top: Path, split: str) -> Listing | None:
    """The official lists of lines "a/abbey/NAME.jpg 0"; a class is named by its folder."""
    lists = next((d for d in (top, top / "trainvalsplit_places205", top.parent,
                              top.parent / "trainvalsplit_places205")
                  if (d / "val_places205.csv").is_file()), None)
    half = "train" if split == "train" else "val"
    if lists is None or not (lists / f"{half}_places205.csv").is_file():
        return None
    base = next((b for b in (top / "data/vision/torralba/deeplearning/images256",
                             top / "images256") if b.is_dir()), top)
    rows = {h: [line.rsplit(None, 1) for line in (lists / f"{h}_places205.csv").read_text()
                .splitlines() if line] for h in {half, "val"}}
    names = {int(k): p.strip("/").split("/", 1)[1].rpartition("/")[0] for p, k in rows["val"]}
    return ([(f"{base}/{p.strip('/')}", int(k)) for p, k in rows[half]],
            [names[k] for k in sorted(names)])


def _listed_tiny(top: Path, split: str) -> Listing | None:
    """The validation half as it is published: all images in one folder, labels in a text file."""
    file = top / "val/val_annotations.txt"
    if split == "train" or not file.is_file() or not (top / "wnids.txt").is_file():
        return None
    classes = sorted((top / "wnids.txt").read_text().split())
    lines = [line.split("\t") for line in file.read_text().splitlines() if line]
    found = [(f"{top}/val/images/{p}", classes.index(c)) for p, c, *_ in lines]
    return (found, classes) if any(os.path.isfile(p) for p, _ in found) else None


def _open_transfer(row: SetRow, data: Data, split: str, view: View) -> ImageSet:
    """A set with its published lists, or else with a tree of class folders for each half."""
    n = row.n_train if split == "train" else row.n_test
    listed = {"flowers102": _listed_flowers, "sun397": _listed_sun, "places205": _listed_places,
              "tiny-imagenet": _listed_tiny}.get(row.name, lambda top, split: None)
    for top in filter(None, (locate(data.root, [f]) for f in row.folders)):
        listing = listed(top, split)
        if listing:
            there = [(p, k) for p, k in listing[0] if os.path.isfile(p)]
            paths, y = [p for p, _ in there], [k for _, k in there]
            classes, source = listing[1], top
            break
    else:
        tops = split_folders(row, data, split)
        source = tops[0]
        classes = [c for c in subfolders(source) if os.listdir(source / c)]
        found = [class_folders(t, classes) for t in tops]
        paths, y = [p for f in found for p in f[0]], [k for f in found for k in f[1]]
    if len(classes) != row.n_classes:
        raise UserError(f"{row.name}: {len(classes):,} classes in {source}, expected "
                        f"{row.n_classes:,}: unpack it again")
    return ImageSet(row.name, y, classes, view, paths=paths, expected=n, source=str(source))


# ---- published -c archives -----------------------------------------------------------------------

def _cell_place(folder: Path, name: str, severity: int) -> Path | None:
    """Where an archive holds a cell: CIFAR's arrays, folders, or folders in the tars' groups."""
    if (folder / f"{name}.npy").is_file():
        return folder / f"{name}.npy"
    tops = (folder / group / name / str(severity)
            for group in ("", "noise", "blur", "weather", "digital"))
    return next((t for t in tops if t.is_dir()), None)


def _cell_arrays(file: Path, severity: int) -> tuple[Tensor, np.ndarray]:
    """(x uint8 (n,3,H,W), y (n,)) of one severity: the five are stacked, in order."""
    try:
        x, y = np.load(file, mmap_mode="r"), np.load(file.with_name("labels.npy"))
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {file} and labels.npy beside it ({e})") from None
    if len(x) != len(y):
        raise UserError(f"{file} holds {len(x):,} images, labels.npy {len(y):,}: unpack it again")
    at = slice((severity - 1) * len(y) // 5, severity * len(y) // 5)
    return torch.tensor(x[at]).permute(0, 3, 1, 2).contiguous(), y[at].astype(np.int64)


def open_cell(images: ImageSet, cell: tuple[str, int] | None
              ) -> tuple[ImageSet, tuple[str, int] | None]:
    """(the images of a cell, None) where the set is a published archive, corrupted already; else
    (images, cell), to be corrupted on the fly.  Raises: UserError on an incomplete cell."""
    if cell is None or images.cells_dir is None:
        return images, cell
    place, out = _cell_place(images.cells_dir, *cell), copy.copy(images)
    if place is None:
        raise UserError(f"{images.cells_dir} lacks the cell {cell[0]}/{cell[1]}")
    if place.suffix == ".npy":
        x, out.y = _cell_arrays(place, cell[1])
        out.images = x
    else:
        out.paths, y = class_folders(place, images.classes)
        out.y = np.asarray(y, np.int64)
    out.source = str(place)
    complete(out, images.allow_partial)
    if len(out.y) != len(images.y):            # else the same images of every cell are in use
        out.index = np.arange(len(out.y))
        out = out.subset(len(images) * (len(images) < len(images.y)))
    return out, None


def _open_archive(row: SetRow, folder: Path, data: Data, view: View) -> ImageSet:
    """A published -c archive, opened at its first cell.  Raises: UserError where cells lack."""
    cells = [(c, s) for c in CORRUPTIONS_15 for s in range(1, 6)]
    lost = [f"{c}/{s}" for c, s in cells if _cell_place(folder, c, s) is None]
    if lost:
        raise UserError(f"{row.name}-c: {len(lost)} of the 75 cells are not in {folder} "
                        f"({', '.join(lost[:3])}{', ...' * (len(lost) > 3)}): unpack the rest, or "
                        f"move the folder away to have all made from {row.name}")
    first = _cell_place(folder, *cells[0])
    if first.suffix == ".npy":
        names, view = [str(k) for k in range(row.n_classes)], View(data.size_px or 32, 1.0)
    else:
        names = synsets() if row.name == "imagenet" else subfolders(first)
    if len(names) != row.n_classes:
        raise UserError(f"{row.name}-c: {len(names)} classes in {first}, expected {row.n_classes}")
    images = ImageSet(row.name, [], names, view, expected=row.n_test)
    images.cells_dir, images.made = folder, "disk"
    images.allow_partial = data.allow_partial
    return open_cell(images, cells[0])[0]


# ---- the table -----------------------------------------------------------------------------------

_TV = "python -c \"import torchvision as t; t.datasets.{}('ROOT', download=True)\""
_IN_VAL = ("val", "validation", "ILSVRC2012_img_val")
_V2 = "huggingface.co/datasets/vaishaal/ImageNetV2: imagenetv2-{}.tar.gz"


def _v2_row(name: str, variant: str) -> SetRow:
    inner = f"imagenetv2-{variant}-format-val"
    return SetRow(name, _open_imagenet, 0, 10000, 1000, _V2.format(variant), (
        inner, f"imagenet-v2/{inner}", f"{name}/{inner}", f"imagenetv2-{variant}", name))


SETS: dict[str, SetRow] = {row.name: row for row in (
    SetRow("shapes", _open_shapes, 8000, 2000, 10, "made here, no file"),
    SetRow("shapes-r", _open_shapes, 0, 2000, 10, "made here, no file"),
    SetRow("fashion-mnist", _open_torchvision, 60000, 10000, 10, _TV.format("FashionMNIST"),
           ("FashionMNIST/raw", "fashion-mnist/FashionMNIST/raw")),
    SetRow("cifar10", _open_torchvision, 50000, 10000, 10,
           _TV.format("CIFAR10") + "; -c: zenodo.org/record/2535967",
           ("cifar-10-batches-py", "cifar10/cifar-10-batches-py"), archive=("CIFAR-10-C",)),
    SetRow("cifar100", _open_torchvision, 50000, 10000, 100,
           _TV.format("CIFAR100") + "; -c: zenodo.org/record/3555552",
           ("cifar-100-python", "cifar100/cifar-100-python"), archive=("CIFAR-100-C",)),
    SetRow("imagenet", _open_imagenet, 1281167, 50000, 1000,
           "image-net.org (ILSVRC2012): class folders, or the validation images in one folder with "
           "a ground-truth file; -c: zenodo.org/record/2235448, its tars in imagenet-c/",
           ("imagenet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC", "imagenet/ILSVRC/Data/CLS-LOC",
            "imagenet-1k", "."), ("train", "ILSVRC2012_img_train"), _IN_VAL,
           archive=("imagenet-c",)),
    _v2_row("imagenet-v2", "matched-frequency"),
    _v2_row("imagenet-v2-threshold", "threshold0.7"),
    _v2_row("imagenet-v2-top", "top-images"),
    SetRow("imagenet-a", _open_imagenet, 0, 7500, 200,
           "github.com/hendrycks/natural-adv-examples: imagenet-a.tar", ("imagenet-a",), part="a"),
    SetRow("imagenet-r", _open_imagenet, 0, 30000, 200,
           "github.com/hendrycks/imagenet-r: imagenet-r.tar", ("imagenet-r",), part="r"),
    SetRow("imagenet-sketch", _open_imagenet, 0, 50889, 1000,
           "github.com/HaohanWang/ImageNet-Sketch: ImageNet-Sketch.zip",
           ("sketch", "imagenet-sketch/sketch", "imagenet-sketch")),
    SetRow("objectnet", _open_imagenet, 0, 18574, 113,
           "objectnet.dev: objectnet-1.0.zip (its licence forbids to train on it)",
           ("objectnet-1.0/images", "objectnet/objectnet-1.0/images", "objectnet/images"),
           part="objectnet"),
    SetRow("tiny-imagenet", _open_transfer, 100000, 10000, 200,
           "cs231n.stanford.edu/tiny-imagenet-200.zip; -c: zenodo.org/record/2536630",
           ("tiny-imagenet-200", "tiny-imagenet/tiny-imagenet-200", "tiny-imagenet"), ("train",),
           ("val",), view=View(64, 1.0), archive=("Tiny-ImageNet-C",)),
    SetRow("flowers102", _open_transfer, 2040, 6149, 102, _TV.format("Flowers102"),
           ("flowers-102", "oxford-flowers-102"), ("train+val", "train+valid"), ("test",)),
    SetRow("places205", _open_transfer, 2448873, 20500, 205,
           "places.csail.mit.edu/downloadData.html: images (256 px) and trainvalsplit_places205, "
           "both in places205/", ("places205",), ("train",), ("val",)),
    SetRow("inaturalist2021", _open_transfer, 500000, 100000, 10000,
           "github.com/visipedia/inat_comp/tree/master/2021: train_mini.tar.gz and val.tar.gz in "
           "inat2021/", ("inat2021", "inaturalist2021", "inaturalist"),
           ("/2021_train_mini", "2021_train_mini", "train_mini"),
           ("/2021_valid", "2021_valid", "val")),
    SetRow("sun397", _open_transfer, 19850, 19850, 397,
           "vision.princeton.edu/projects/2010/SUN: SUN397.tar.gz, and Partitions.zip unpacked in "
           "SUN397/", ("SUN397",), ("train",), ("test", "val")),
)}


SIDES = ("seen", "unseen")


def class_side(name: str) -> tuple[str, str]:
    """(SET, SIDE) of SET@SIDE, the images of the classes of data.classes or of the others."""
    whole, _, side = name.rpartition("@")
    return (whole, side) if side in SIDES else (name, "")


def one_side(images: ImageSet, side: str, classes: str) -> ImageSet:
    """The images of the seen or the unseen classes.  classes: as data.classes.

    Raises: UserError."""
    words = [w.strip() for w in classes.split(",") if w.strip()]
    if len(words) == 1 and words[0].isdigit():
        words = images.classes[:int(words[0])]
    for w in words:
        choose(dict.fromkeys(images.classes), w, f"class of {images.name} (data.classes)")
    keep = [k for k, c in enumerate(images.classes) if (c in words) == (side == "seen")]
    if images.project is not None or images.cells_dir is not None or len(keep) < 2:
        raise UserError(f"{images.name}@{side}: {len(keep)} classes; data.classes={classes!r} has "
                        "to leave two or more, of a set with classes of its own, no -c archive")
    out = images.only(keep)
    out.name = f"{images.name}@{side}"
    return out


def base_name(name: str) -> tuple[str, bool]:
    """(the set that is read, whether it is corrupted): cifar10-c -> (cifar10, True)."""
    whole, side = class_side(name)
    if side:
        base, is_corrupted = base_name(whole)
        return f"{base}@{side}", is_corrupted
    if name.startswith(("folder:", "folder-c:")):
        return name.replace("folder-c:", "folder:", 1), name.startswith("folder-c:")
    if name not in SETS and name.endswith("-c") and name[:-2] in SETS:
        return name[:-2], True
    return name, False


def set_row(base: str) -> SetRow:
    """The row of a set that is no folder; of SET@PART that of SET.  Raises: UserError with the
    nearest name, -c included."""
    base, at, part = class_side(base)[0].partition("@")
    if not at:
        return choose(SETS | {f"{n}-c": r for n, r in SETS.items()}, base, "set")
    row = choose({n: r for n, r in SETS.items() if r.n_classes == 1000 and r.n_test % 1000 == 0},
                 base, "set of all of ImageNet's classes")
    choose(dict.fromkeys(PARTS), part, "part of ImageNet")
    return row


def open_set(name: str, data: Data, split: str = "test", view: View = View()) -> ImageSet:
    """The named set.  view: of picture files; data.size_px goes before its size.

    A -c set is the published archive where that is on disk, else the clean set to be corrupted;
    then pictures are cut as the benchmark's were, whatever the network's view.  SET@PART: the
    images of a part's classes, scored over these.  Raises: UserError when it is unknown, absent
    (Absent) or incomplete."""
    whole, side = class_side(name)
    if side:
        return one_side(open_set(whole, data, split, view), side, data.classes)
    base, corrupted = base_name(name)
    row = None if base.startswith("folder:") else set_row(base)
    view = row.view if row and row.view else View() if corrupted else view
    if not (corrupted and row):
        view = dataclasses.replace(view, size_px=data.size_px or view.size_px)
    part = base.partition("@")[2] if row else ""
    if split == "train" and (corrupted or part or row and not row.n_train):
        raise UserError(f"{name} has no training split: it is there to be scored")
    folder = locate(data.root, row.archive) if corrupted and row and split == "test" else None
    if folder:
        images = _open_archive(row, folder, data, dataclasses.replace(view, crop_pct=1.0))
    else:
        images = row.open(row, data, split, view) if row else _open_folder(base, split, view)
        images = complete(images, data.allow_partial)
        images.made = "regenerated" * corrupted
    images = of_part(images, part) if part else images
    if data.names:
        names = read_lines(data.names, "data.names")
        images.names = names if len(names) == len(images.classes) else images.names
    return images.subset(data.n_train if split == "train" else data.n_test)


# ==== 6. MODELS ====
# In: a name or a module.  Out: a network from images (uint8 or [0, 1]) to logits, and the same
# network as a list of stages.  Always: stages(net)(x) equals net(x) to the last bit.


class Net(nn.Module):
    """A network that takes images and normalises and resizes them for itself.

    view: how it wants picture files to be cut for scoring.
    prompts, towers: of a zero-shot network, see `zero_shot_net`.
    Shapes: x (B,3,H,W), uint8 or in [0, 1] -> logits (B, n_classes)."""

    def __init__(self, net: nn.Module, *, name: str, n_classes: int, mean=(0.5,) * 3,
                 std=(0.25,) * 3, size_px: int = 0, view: View = View()):
        super().__init__()
        self.net, self.name, self.n_classes, self.size_px = net, name, n_classes, size_px
        self.view, self.prompts, self.towers = view, None, {}
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def prepare(self, x: Tensor) -> Tensor:
        """Normalised images of this network's size."""
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        if self.size_px and x.shape[-1] != self.size_px:
            x = F.interpolate(x, size=(self.size_px, self.size_px), mode="bicubic", antialias=True)
        return (x - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.prepare(x))


class Embedding(nn.Identity):
    """What stands in a classifier's place where the embeddings are the output.

    Shapes: (B, out_features) -> the same."""

    def __init__(self, out_features: int):
        super().__init__()
        self.out_features = out_features


class TextHead(nn.Module):
    """Zero-shot classifier: exp(logit_scale) cos(h, class embedding) + logit_bias, in float32.

    weight (C,D): the classes' embeddings; nothing here is trained.
    Shapes: image embeddings h (B,D) -> logits (B,C).  Paper: [A] section 4.4."""

    def __init__(self, weight: Tensor, logit_scale: float, logit_bias: float = 0.0):
        super().__init__()
        self.register_buffer("weight", F.normalize(weight.float(), dim=-1))
        self.register_buffer("logit_scale", torch.tensor(float(logit_scale)))
        self.register_buffer("logit_bias", torch.tensor(float(logit_bias)))

    @property
    def out_features(self) -> int:
        return len(self.weight)

    def forward(self, h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            cosine = F.normalize(h.float(), dim=-1) @ self.weight.T
            return self.logit_scale.exp() * cosine + self.logit_bias

    def pull(self, h: Tensor, v: Tensor) -> Tensor:
        """sum_j c_j dz_j/dh at h, for v = sum_j c_j weight_j; (B,D) each.  The part of v along h
        drops out: a cosine does not change with the length of h."""
        n = h.norm(dim=-1, keepdim=True)
        return self.logit_scale.exp() * (v - (v * h).sum(-1, keepdim=True) * h / n.square()) / n


class Tower(nn.Module):
    """The visual tower of a CLIP model and a head on its embeddings: fc(visual(x)).

    fc: any module from embeddings (B,D) to logits (B, fc.out_features); of the CLIP's state dict
    the tower takes visual.* as it is.
    Shapes: normalised images (B,3,H,W) -> logits (B, fc.out_features)."""

    def __init__(self, visual: nn.Module, fc: nn.Module):
        super().__init__()
        self.visual, self.fc = visual, fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.visual(x))


# ---- weights on disk -----------------------------------------------------------------------------

NESTS = ("state_dict", "model", "model_state_dict")      # where training scripts put the tensors
PREFIXES = ("module.", "_orig_mod.", "net.")            # DDP, torch.compile, a Net's own state dict
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")    # in archives


def save_weights(path: Path, module: nn.Module, meta: dict) -> None:
    """Writes the module's state as .safetensors, with `meta` from which `load` builds it again."""
    state = {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}
    write_atomically(path, lambda p: save_file(state, p, {"erpm": json.dumps(meta)}))


def _made_by_torch(path: Path | str) -> bool:
    """Whether the file is one of torch.save or torch.jit.save: a zip, or an old plain pickle."""
    if not Path(path).is_file():
        raise UserError(f"no weights file {path}")
    with open(path, "rb") as f:
        head = f.read(9)                                  # .safetensors: a length (8 bytes), then {
    return head[:2] == b"PK" or head[:1] == b"\x80" and head[8:] != b"{"


def _is_archive(path: Path | str) -> bool:
    """Whether the file is a TorchScript archive, the form in which OpenAI gave CLIP away."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as f:
        return any(name.endswith("/constants.pkl") for name in f.namelist())


def read_meta(path: Path | str) -> dict:
    """What save_weights wrote beside the tensors; {} for a foreign file.  Raises: UserError."""
    if _made_by_torch(path):
        return {}
    try:
        with safe_open(path, "pt") as f:
            return json.loads((f.metadata() or {}).get("erpm", "{}"))
    except Exception as e:
        raise UserError(f"{path} is not a .safetensors file, nor one of torch.save "
                        f"({type(e).__name__}: {e})") from None


def _load_torch(path: Path | str):
    """What torch.save or torch.jit.save wrote: tensors and plain types.  Raises: UserError."""
    try:
        if not _is_archive(path):
            return torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        with warnings.catch_warnings(action="ignore", category=FutureWarning):    # of deprecation
            state = torch.jit.load(path, "cpu").state_dict()
        return {k: v for k, v in state.items() if k not in NOT_WEIGHTS}
    except Exception as e:                                # pickle's and torch's own, of many kinds
        why = f"{type(e).__name__}: {str(e).strip().splitlines()[0]}"
        raise UserError(f"{path} is not a file of plain tensors, and nothing is unpickled here "
                        f"({why}): save its state dict alone, where you trust it") from None


def read_state(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU.

    path: .safetensors, a state dict that torch.save wrote (in one of NESTS, with one of PREFIXES
    before its keys), or a TorchScript archive.  No pickled object is made and no code is run.
    Raises: UserError."""
    ours = read_meta(path)
    if _made_by_torch(path):
        state = _load_torch(path)
    else:
        with safe_open(path, "pt") as f:
            state = {k: f.get_tensor(k) for k in f.keys()}
    if ours:
        return state
    for nest in NESTS:
        if isinstance(state, dict) and isinstance(state.get(nest), dict):
            state = state[nest]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor)
                                              for k, v in state.items()):
        found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path} holds no state dict but {found[:200]}: expected tensors by name, "
                        f"or these in one of {', '.join(NESTS)}")
    for prefix in PREFIXES:
        if state and all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def load_strictly(module: nn.Module, state: dict[str, Tensor], path: Path | str, name: str) -> None:
    """Loads the tensors into the module.  Raises: UserError that lists what does not fit."""
    own = module.state_dict()
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}" for k, v in own.items()
              if k in state and state[k].shape != v.shape]
    if missing or extra or shapes:
        few = lambda keys: f"{len(keys)} {keys[:3]}" if keys else "none"               # noqa: E731
        raise UserError(f"{path} does not fit {name}: missing {few(missing)}, unexpected "
                        f"{few(extra)}, of another shape {few(shapes)}")
    module.load_state_dict(state)


def _head_keys(net: nn.Module) -> dict[str, Tensor]:
    """The classifier's part of the state dict: that of the last Linear layer."""
    linear = [k for k, m in net.named_modules() if isinstance(m, nn.Linear)]
    return {k: v for k, v in net.state_dict().items() if linear and k.startswith(f"{linear[-1]}.")}


def lacks_head(net: Net, path: str | Path) -> bool:
    """Whether the file has no classifier for net: an encoder's weights (CLIP, DINOv2, MAE)."""
    meta = read_meta(path)
    return "both towers" in meta or (
        not meta and not _head_keys(net.net).keys() & read_state(path).keys())


def load_weights(module: nn.Module, path: str | Path, new_head: bool = False) -> dict:
    """Loads the file into the module, strictly, and returns its meta.

    A file without our meta is taken for the inner network's, that of two towers for its visual
    tower's.  new_head: a file of an encoder alone leaves the classifier as it is.
    Raises: UserError that lists missing and unexpected keys."""
    meta, state = read_meta(path), read_state(path)
    target = module
    if isinstance(module, Net) and "both towers" in meta:
        state = {k.removeprefix("visual.net."): v for k, v in state.items()}
    if isinstance(module, Net) and (not meta or "both towers" in meta):
        target = module.net
        if isinstance(target, Tower) and "logit_scale" in state:
            state = {k: v for k, v in state.items() if k.startswith("visual.")}
        head = _head_keys(target)
        if new_head and not head.keys() & state.keys():
            state |= head
        state |= {k: v for k, v in target.state_dict().items()     # older torch did not count them
                  if k.endswith("num_batches_tracked") and k not in state}
    load_strictly(target, state, path, getattr(module, "name", type(module).__name__))
    return meta


# ---- the families --------------------------------------------------------------------------------

class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), the block of the CIFAR ResNets."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Identity() if n_in == n_out and stride == 1 else nn.Sequential(
            nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _build_cifar(name: str, classes: int | None, pretrained: bool) -> Net:
    """resnetD[-wK][-s2]: the ResNet of depth D = 6n + 2 for small images (He et al. 2016, 4.2),
    K times as wide, with a stem of stride 2."""
    m = re.fullmatch(r"resnet(\d+)(?:-w(\d+))?(?:-s(\d))?", name)
    if not m or int(m[1]) < 8 or (int(m[1]) - 2) % 6:
        raise UserError(f"unknown network cifar:{name}: expected cifar:resnetD[-wK][-s2] with "
                        "D = 8, 14, 20, ...")
    n, width, stride = (int(m[1]) - 2) // 6, 16 * int(m[2] or 1), int(m[3] or 1)
    layers = [nn.Sequential(nn.Conv2d(3, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width),
                            nn.ReLU())]
    n_in = width
    for level in range(3):
        for i in range(n):
            n_out = width * 2 ** level
            layers.append(BasicBlock(n_in, n_out, 2 if level and not i else 1))
            n_in = n_out
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(n_in, classes or 10))
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return Net(net, name=f"cifar:{name}", n_classes=classes or 10)


def _from_hub(name: str, load: Callable):
    """load(), which may need a network.  Raises: UserError that names the way without one."""
    try:
        return load()
    except Exception as e:                                # the hubs' errors are of many kinds
        raise UserError(f"the weights of {name} could not be loaded ({type(e).__name__}): no "
                        "network? give a local file: model.student_weights=PATH or "
                        "model.teacher_weights=PATH") from None


def _build_timm(name: str, classes: int | None, pretrained: bool) -> Net:
    """Any network of timm with its own mean, std, input size and view."""
    import timm
    if not timm.is_model(name):
        known = timm.list_models() + timm.list_pretrained()
        raise UserError(f"timm has no network {name!r}{nearest(name, known)}")
    make = functools.partial(timm.create_model, name, pretrained=pretrained,
                             **({} if classes is None else {"num_classes": classes}))
    net = _from_hub(f"timm:{name}", make) if pretrained else make()
    cfg, size = net.pretrained_cfg, net.pretrained_cfg["input_size"][-1]
    fixed = cfg.get("fixed_input_size", False) or "." in name   # a tag: as its weights were trained
    view = View(size, cfg["crop_pct"], cfg["interpolation"], cfg.get("crop_mode") == "squash")
    return Net(net, name=f"timm:{name}", n_classes=net.num_classes, mean=cfg["mean"],
               std=cfg["std"], size_px=size if fixed else 0, view=view)


def _torchvision_weights(name: str):
    """(MODEL, member of its weights enum or None) of MODEL[/TAG].  Raises: UserError."""
    models = torchvision.models
    model, slash, tag = name.partition("/")
    odd = {"googlenet", "inception_v3"}                   # they normalise inside by their weights
    known = set(models.list_models(module=models)) - odd
    if model not in known:
        raise UserError(f"torchvision has no network {model!r}{nearest(model, sorted(known))}")
    tags = models.get_model_weights(model).__members__
    return model, choose(tags, tag, f"weights of torchvision:{model}") if slash else None


def _build_torchvision(name: str, classes: int | None, pretrained: bool) -> Net:
    """Any classifier of torchvision; a tag gives its weights, their mean, std, size and view."""
    model, weights = _torchvision_weights(name)
    n = classes or (len(weights.meta["categories"]) if weights else 1000)
    mean, std, size, view = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0, View()
    if weights:
        t = weights.transforms()
        mean, std, size = t.mean, t.std, t.crop_size[0]
        view = View(size, size / t.resize_size[0], t.interpolation.value)
    vit = model.startswith("vit_")
    net = torchvision.models.get_model(model, weights=None, num_classes=n,
                                       **({"image_size": size or 224} if vit else {}))
    if pretrained:
        state = _from_hub(f"torchvision:{name}",
                          lambda: weights.get_state_dict(progress=False, check_hash=True))
        if n != len(weights.meta["categories"]):                                  # as timm does
            state |= _head_keys(net)
        load_strictly(net, state, weights.url, f"torchvision:{name}")
    return Net(net, name=f"torchvision:{name}", n_classes=n, mean=mean, std=std,
               size_px=size or 224 * vit, view=view)


def _open_clip_tag(name: str) -> tuple[str, str]:
    """(MODEL, TAG or "") of MODEL[/TAG].  Raises: UserError on an unknown one, and where the
    weights were trained with another activation than the network has."""
    import open_clip
    model, slash, tag = name.partition("/")
    known = open_clip.list_models()
    if model not in known:
        raise UserError(f"open_clip has no network {model!r}{nearest(model, known)}")
    if slash:
        tags = open_clip.list_pretrained_tags_by_model(model)
        choose(dict.fromkeys(tags), tag, f"weights of open_clip:{model}")
        want = open_clip.get_pretrained_cfg(model, tag).get("quick_gelu") or False
        if want and not open_clip.get_model_config(model).get("quick_gelu"):
            raise UserError(f"open_clip:{name}: these weights want QuickGELU and {model} has GELU: "
                            f"use open_clip:{model}-quickgelu/{tag}")
    return model, tag


def open_clip_model(name: str, weights: str | None = None) -> nn.Module:
    """The whole CLIP model MODEL[/TAG] of open_clip, visual and text tower, in eval mode.

    weights: None = those of the tag from the hub, a file of the whole model (OpenAI's archives
    too), or "random".  Raises: UserError."""
    import open_clip
    model, tag = _open_clip_tag(name)
    make = functools.partial(open_clip.create_model, model, pretrained_text=False)
    off = logging.root.manager.disable
    logging.disable(logging.ERROR)                        # it warns of random weights at any name
    try:
        hub = weights is None and tag
        net = _from_hub(f"open_clip:{name}", lambda: make(tag)) if hub else make()
    except UserError:
        raise
    except Exception as e:                                # its text tower may need other packages
        raise UserError(f"open_clip:{name} could not be built: {str(e).splitlines()[0]}") from None
    finally:
        logging.disable(off)
    if weights not in (None, "", "random"):
        if _is_archive(weights) and not open_clip.get_model_config(model).get("quick_gelu"):
            raise UserError(f"{weights} is an archive of OpenAI, which want QuickGELU: use "
                            f"open_clip:{model}-quickgelu")
        load_strictly(net, read_state(weights), weights, f"open_clip:{name}")
    return net.eval()


def _build_open_clip(name: str, classes: int | None, pretrained: bool,
                     clip: nn.Module | None = None) -> Net:
    """The visual tower of a CLIP model with a new linear head; without classes its embeddings."""
    import open_clip
    model, tag = _open_clip_tag(name)
    clip = clip or open_clip_model(name, None if pretrained else "random")
    clip.visual.output_tokens = False                     # CoCa's tower gives a pair otherwise
    width = open_clip.get_model_config(model)["embed_dim"]
    cfg = open_clip.get_model_preprocess_cfg(clip)
    # without a tag: what all weights of this network agree on
    tags = [tag] if tag else open_clip.list_pretrained_tags_by_model(model)
    for k in ("mean", "std", "interpolation", "resize_mode"):
        values = {open_clip.get_pretrained_cfg(model, t)[k] for t in tags}
        cfg[k] = values.pop() if len(values) == 1 else cfg[k]
    size = cfg["size"] if isinstance(cfg["size"], int) else cfg["size"][0]
    fc = nn.Linear(width, classes) if classes else Embedding(width)
    return Net(Tower(clip.visual, fc), name=f"open_clip:{name}", n_classes=classes or 0,
               mean=cfg["mean"], std=cfg["std"], size_px=size,
               view=View(size, 1.0, cfg["interpolation"], cfg["resize_mode"] == "squash"))


TAGS = {"timm": ".", "torchvision": "/", "open_clip": "/"}       # what stands before a weights tag


def has_tag(name: str) -> bool:
    """Whether the name asks for pretrained weights: timm:resnet50.tv_in1k,
    torchvision:resnet50/IMAGENET1K_V1 and open_clip:ViT-B-32-quickgelu/openai do."""
    family, _, rest = name.partition(":")
    return family in TAGS and TAGS[family] in rest


# ---- two towers: images and text in one space ----------------------------------------------------

N_WORDS = 4096


def word_ids(texts: Sequence[str], length: int = 16) -> Tensor:
    """Numbers 1..N_WORDS-1 of the texts' first words by hashing, 0 behind the last: (N,length)."""
    out = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in zip(out, texts):
        ids = [1 + fold(w) % (N_WORDS - 1) for w in re.findall(r"\w+", text.lower())[:length]]
        row[:len(ids)] = torch.tensor(ids, dtype=torch.long)
    return out


def entailment(words: Tensor) -> Tensor:
    """Whether text i has every word of text j, (N,N), from word_ids (N,L)."""
    bags = words.new_zeros(len(words), N_WORDS, dtype=torch.float32).scatter_(1, words, 1.0)
    bags[:, 0] = 0                                        # what stands behind the last word
    return bags @ bags.T == bags.sum(1)


class TinyClip(nn.Module):
    """A small image tower and a bag of words, trained together: the two towers of the demo.

    Shapes: images (B,3,H,W), word_ids (N,L) -> scaled cosines (B,N)."""

    def __init__(self, visual: Net):
        super().__init__()
        self.visual, width = visual, visual.net.fc.out_features
        self.text = nn.Sequential(nn.EmbeddingBag(N_WORDS, 64, mode="mean", padding_idx=0),
                                  nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, width))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        h, w = self.visual(x), self.text(words)
        with torch.autocast(h.device.type, enabled=False):
            h, w = F.normalize(h.float(), dim=-1), F.normalize(w.float(), dim=-1)
            return self.logit_scale.exp().clamp(max=100) * h @ w.T


def _build_clip_tiny(name: str, classes: int | None, pretrained: bool) -> Net:
    """A cifar: network with an embedding of 64 dimensions, and a linear head if there are
    classes."""
    tower = _build_cifar(name, 64, False).net
    fc = nn.Linear(64, classes) if classes else Embedding(64)
    return Net(Tower(tower, fc), name=f"clip-tiny:{name}", n_classes=classes or 0)


class Towers(NamedTuple):
    """What a two-tower network is made of.  visual: images -> embeddings (B,D); encode: list of N
    texts -> (N,D); neither is normalised."""
    visual: Net
    encode: Callable
    logit_scale: float
    logit_bias: float


def _tiny_towers(name: str, weights: str | None) -> Towers:
    model = TinyClip(_build_clip_tiny(name, None, False)).eval()
    if weights not in (None, "", "random"):
        load_strictly(model, read_state(weights), weights, f"clip-tiny:{name}")

    def encode(texts: Sequence[str]) -> Tensor:
        return model.text.to(pick_device())(word_ids(texts).to(pick_device()))
    scale = min(float(model.logit_scale.detach()), math.log(100))
    return Towers(model.visual, encode, scale, 0.0)


def _open_clip_towers(name: str, weights: str | None) -> Towers:
    import open_clip
    clip = open_clip_model(name, weights)

    def encode(texts: Sequence[str]) -> Tensor:
        try:
            tokenizer = open_clip.get_tokenizer(name.partition("/")[0])
        except Exception as e:                            # the hub's errors are of many kinds
            raise UserError(f"the tokenizer of open_clip:{name} could not be had "
                            f"({type(e).__name__}): it may want `pip install transformers` and, "
                            "the first time, a network") from None
        return clip.to(pick_device()).encode_text(tokenizer(list(texts)).to(pick_device()))
    scale, bias = (0.0 if v is None else float(v.detach())
                   for v in (clip.logit_scale, clip.logit_bias))
    return Towers(_build_open_clip(name, None, False, clip), encode, scale, bias)


TWO_TOWERS = {"clip-tiny": _tiny_towers, "open_clip": _open_clip_towers}


def has_text(name: str) -> bool:
    """Whether the network comes with a text tower, so that prompts can name its classes."""
    return name.partition(":")[0] in TWO_TOWERS


def two_towers(name: str, weights: str | None = None) -> Towers:
    """Both towers of clip-tiny:NAME or open_clip:NAME[/TAG], in eval mode.

    weights: None = those of the tag, a file of both towers, or "random".  Raises: UserError."""
    family, _, rest = name.partition(":")
    if not has_text(name):
        raise UserError(f"{name} has no text tower: prompts as classes want one of "
                        f"{', '.join(f'{k}:NAME' for k in TWO_TOWERS)}")
    return TWO_TOWERS[family](rest, weights)


@dataclass(frozen=True)
class Prompts:
    """Names of the classes, and templates whose {} stands for the name."""
    classes: Sequence[str]
    templates: Sequence[str] = ("a photo of a {}.",)

    def __post_init__(self):
        for field in ("classes", "templates"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        bad = [t for t in self.templates if t.count("{}") != 1]
        if bad or not self.templates or len(self.classes) < 2:
            raise UserError("prompts: expected two classes or more, and templates with one {} for "
                            f"the class each; got {len(self.classes)}, {bad or self.templates}")


def prompts_of(images: ImageSet, templates: str = "") -> Prompts:
    """The prompts of a set's classes.  Names: of data.names; OpenAI's where the classes are synsets
    (all 1000 where the set scores a part of them); else the classes' own, _ and - as spaces.
    templates: a file; "" = OpenAI's 80 for ImageNet, else a photo of a {}."""
    names, given = images.names, images.names != images.classes
    lines = read_lines(templates, "model.templates") if templates else None
    if images.project is not None or all(re.fullmatch(r"n\d{8}", c) for c in images.classes):
        import open_clip
        known, of = open_clip.IMAGENET_CLASSNAMES, {s: i for i, s in enumerate(synsets())}
        if images.project is not None or not given:
            names = known if images.project is not None else [
                known[of[c]] if c in of else c for c in images.classes]
        lines = lines or [t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
    elif not given:
        names = [re.sub("[_-]+", " ", n) for n in names]
    return Prompts(names, lines or Prompts.templates)


@torch.no_grad()
def text_weights(encode: Callable, prompts: Prompts, chunk: int = 512) -> Tensor:
    """Class embeddings (C,D) of norm 1: of each class the mean over the templates of its normalised
    prompt embeddings, normalised again.  encode: list of texts -> (N,D)."""
    texts = [t.replace("{}", c) for c in prompts.classes for t in prompts.templates]
    rows, bar = [], progress(len(texts), "prompts")
    for i in range(0, len(texts), chunk):
        rows.append(F.normalize(encode(texts[i:i + chunk]).float(), dim=-1))
        bar.update(len(rows[-1]))
    bar.close()
    each = torch.cat(rows).unflatten(0, (len(prompts.classes), -1))                     # (C,T,D)
    return F.normalize(each.mean(1), dim=-1).cpu()


def class_embeddings(name: str, towers: dict, prompts: Prompts, cache: Path | None = None,
                     encode: Callable | None = None) -> Tensor:
    """text_weights of a network's own text tower, kept in the folder cache: it runs once.

    name, towers: of the zero-shot network; encode: its text tower where it is at hand.
    Raises: UserError when the towers' file is not what it was."""
    key = fold(name, towers["sha"], list(prompts.classes), list(prompts.templates))
    file = cache and cache / f"text-{key:016x}.safetensors"
    if file and file.is_file():
        with safe_open(file, "pt") as f:
            return f.get_tensor("weight")
    if encode is None:
        if towers["sha"] == "random" or towers["file"] and (
                not Path(towers["file"]).is_file() or file_sha(towers["file"]) != towers["sha"]):
            raise UserError(f"{name}: its text tower is not in {towers['file'] or 'any file'}, so "
                            "new classes cannot be named: put back the file that the student was "
                            "made from")
        encode = two_towers(name, towers["file"] or None).encode
    weight = text_weights(encode, prompts)
    if file and world()[0] == 0:
        write_atomically(file, lambda p: save_file({"weight": weight}, p))
    return weight


def _text_headed(net: Net, head: TextHead, prompts: Prompts, towers: dict) -> Net:
    """The visual tower with a text head in the place of its classifier."""
    net.net.fc, net.n_classes, net.prompts, net.towers = head, len(head.weight), prompts, towers
    return net.eval()


def zero_shot_net(name: str, prompts: Prompts, weights: str | None = None,
                  cache: Path | None = None) -> Net:
    """The zero-shot network: a visual tower whose classifier are the embeddings of prompts.

    weights: as two_towers takes them.  cache: folder that keeps the embeddings.
    The network knows its prompts and where its text tower is: towers {"file", "sha"}."""
    t = two_towers(name, weights)
    random_ = weights == "random" or not weights and not has_tag(name)
    file = "" if weights in (None, "", "random") else str(weights)
    towers = {"file": file, "sha": "random" if random_ else file and file_sha(file)}
    weight = class_embeddings(name, towers, prompts, None if random_ else cache, t.encode)
    return _text_headed(t.visual, TextHead(weight, t.logit_scale, t.logit_bias), prompts, towers)


FAMILIES = {"timm": _build_timm, "torchvision": _build_torchvision, "open_clip": _build_open_clip,
            "cifar": _build_cifar, "clip-tiny": _build_clip_tiny}


def tag_classes(name: str) -> int | None:
    """Number of outputs that the pretrained weights of a tagged name come with, 0 for an encoder
    alone; None without a tag.  Raises: UserError on an unknown tag."""
    family, _, rest = name.partition(":")
    if not has_tag(name):
        return None
    if family == "torchvision":
        return len(_torchvision_weights(rest)[1].meta["categories"])
    if family == "open_clip":
        return _open_clip_tag(rest) and 0
    import timm
    with contextlib.suppress(RuntimeError, AttributeError):
        return timm.get_pretrained_cfg(rest).num_classes
    known = [f"timm:{n}" for n in timm.list_pretrained()]
    raise UserError(f"timm has no pretrained network {name!r}{nearest(name, known)}")


def named(name: str, classes: int | None = None, weights: str | None = None) -> Net:
    """The network FAMILY:NAME in eval mode; see `build`, which knows more kinds of names."""
    family, colon, rest = name.partition(":")
    if not colon:
        raise UserError(f"network {name!r}: expected FAMILY:NAME, with FAMILY one of "
                        f"{', '.join([*FAMILIES, 'run'])}, e.g. timm:resnet50.tv_in1k")
    maker = choose(FAMILIES, family, "network family")
    net = maker(rest, classes, has_tag(name) and weights is None)
    if weights not in (None, "", "random"):
        meta = load_weights(net, weights, new_head=bool(classes))
        net.size_px = meta.get("size_px", 0) if meta else net.view.size_px * (family != "cifar")
    return net.eval()


# ---- stages --------------------------------------------------------------------------------------

def _only(net: nn.Module, names: Sequence[str]) -> nn.Module:
    """A shallow copy of net that has the named children, parameters and buffers alone."""
    part, heads = copy.copy(net), {n.partition(".")[0] for n in names}
    part._parameters = {k: v for k, v in net._parameters.items() if k in heads}
    part._buffers = {k: v for k, v in net._buffers.items() if k in heads}
    part._modules = {}
    for k, m in net._modules.items():
        below = [n[len(k) + 1:] for n in names if n.startswith(f"{k}.")]
        if k in names or below:
            part._modules[k] = m if k in names else _only(m, below)
    return part


class Part(nn.Module):
    """Some children and parameters of a network with a forward of their own: f(net, x).

    names: dotted paths; one that the network lacks is passed over.
    The children are the network's own, not copies; what is not named does not come along."""

    def __init__(self, net: nn.Module, names: Sequence[str], f: Callable):
        super().__init__()
        self.part, self.f = _only(net, names), f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.part, x)


class Classifier(nn.Module):
    """The last stage: features (norm, pooling, projection), dropout, fc.

    fc: a Linear, or any module from features (B,D) to logits (B, fc.out_features).
    Shapes: boundary features -> logits (B,C)."""

    def __init__(self, features: nn.Module, fc: nn.Module):
        super().__init__()
        self.features, self.drop, self.fc = features, nn.Identity(), fc

    def forward(self, f: Tensor) -> Tensor:
        h = self.drop(self.features(f))
        if any(p.dtype != torch.float32 for p in self.fc.parameters()):
            return self.fc(h)
        with torch.autocast(h.device.type, enabled=False):   # logits in float32: sigma, KL, ties
            return self.fc(h.float())


def _in_turn(n: nn.Module, x: Tensor) -> Tensor:
    """The children one after another."""
    for m in n.children():
        x = m(x)
    return x


def _opened(modules) -> list[nn.Module]:
    """The modules in order, those in plain Sequentials one by one."""
    return [b for m in modules for b in (_opened(m) if type(m) is nn.Sequential else [m])]


def _staged(pairs) -> list[nn.Module]:
    """The blocks of stages (downsampling, blocks); the downsampling joins its first block."""
    blocks: list[nn.Module] = []
    for down, (first, *rest) in pairs:
        blocks += [first if isinstance(down, nn.Identity) else nn.Sequential(down, first), *rest]
    return blocks


def _torchvision_staged(net: nn.Module) -> list[nn.Module]:
    """Blocks of net.features: stem, blocks, downsampling, blocks, downsampling, blocks, ..."""
    return _staged(zip([nn.Identity(), *net.features[2::2]], net.features[1::2]))


def _sharing(net: nn.Module, shared: str, f: Callable) -> list[nn.Module]:
    """Blocks that are called with what one module of the network gives to all: f(i, part, x)."""
    if net._modules.get(shared) is None:
        return list(net.blocks)
    return [Part(net, (f"blocks.{i}", shared), functools.partial(f, i))
            for i in range(len(net.blocks))]


def _eva_block(i: int, n: nn.Module, x: Tensor) -> Tensor:
    """Block i with the rotary embedding of the grid of patches (square, as all images here)."""
    [block] = n.blocks
    side = math.isqrt(x.shape[1] - n.num_prefix_tokens)
    free = n.dynamic_img_size or not hasattr(n.rope, "feat_shape")
    rope = n.rope.get_embed(shape=(side, side)) if free else n.rope.get_embed()
    return block(x, rope=rope[i] if n.rope_mixed else rope)


def _beit_block(i: int, n: nn.Module, x: Tensor) -> Tensor:
    [block] = n.blocks
    return block(x, shared_rel_pos_bias=n.rel_pos_bias())


def _beit_embed(n: nn.Module, x: Tensor) -> Tensor:
    x = torch.cat((n.cls_token.expand(len(x), -1, -1), n.patch_embed(x)), 1)
    return n.pos_drop(x if n.pos_embed is None else x + n.pos_embed)


def _torchvision_vit_embed(n: nn.Module, x: Tensor) -> Tensor:
    x = torch.cat([n.class_token.expand(len(x), -1, -1), n._process_input(x)], 1)
    return n.encoder.dropout(x + n.encoder.pos_embedding)


def _clip_pool(n: nn.Module, x: Tensor) -> Tensor:
    x = n._pool(x)[0]
    return x if n.proj is None else x @ n.proj


def _pooled(*names: str) -> Callable:
    """Forward of timm's networks behind the blocks: the named layers, then all but the Linear."""
    def pool(n: nn.Module, x: Tensor) -> Tensor:
        for name in names:
            x = n._modules[name](x)
        return n.forward_head(x, pre_logits=True)
    return pool


@dataclass(frozen=True)
class Plan:
    """How a class of networks is cut: stem | blocks | last | fc.

    stem, last, fc: names of children and parameters, dotted, as Part takes them; fc "" = none.
    blocks: names of the containers whose children are the stages, or net -> stages.
    embed, pool: forwards of stem and last, (part of the net, x) -> x."""
    stem: str
    blocks: str | Callable
    last: str
    fc: str
    embed: Callable = _in_turn
    pool: Callable = _in_turn


_TOKENS = "patch_embed cls_token reg_token pos_embed pos_drop patch_drop rope norm_pre"
_TIMM_HEAD = "head.global_pool head.norm head.flatten head.pre_logits head.drop"
_LAYERS = "layer1 layer2 layer3 layer4"
_flat = lambda n, x: n.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))              # noqa: E731
PLANS = {                                   # exact classes: a subclass may compute something else
    "timm.models.vision_transformer.VisionTransformer": Plan(
        _TOKENS, "blocks", "norm attn_pool fc_norm head_drop", "head",
        lambda n, x: n.norm_pre(n.patch_drop(n._pos_embed(n.patch_embed(x)))), _pooled("norm")),
    "timm.models.eva.Eva": Plan(
        _TOKENS, lambda n: _sharing(n, "rope", _eva_block),
        "norm attn_pool fc_norm head_drop", "head",
        lambda n, x: n.norm_pre(n._pos_embed(n.patch_embed(x))[0]), _pooled("norm")),
    "timm.models.beit.Beit": Plan(
        _TOKENS, lambda n: _sharing(n, "rel_pos_bias", _beit_block), "norm fc_norm head_drop",
        "head", _beit_embed, _pooled("norm")),
    "timm.models.resnet.ResNet": Plan("conv1 bn1 act1 maxpool", _LAYERS, "global_pool", "fc",
                                      pool=_pooled()),
    "timm.models.convnext.ConvNeXt": Plan(
        "stem", lambda n: _staged((s.downsample, s.blocks) for s in n.stages),
        f"norm_pre {_TIMM_HEAD}", "head.fc", pool=_pooled("norm_pre")),
    **dict.fromkeys(
        ("timm.models.swin_transformer.SwinTransformer",
         "timm.models.swin_transformer_v2.SwinTransformerV2"),
        Plan("patch_embed", lambda n: _staged((s.downsample, s.blocks) for s in n.layers),
             f"norm {_TIMM_HEAD}", "head.fc", pool=_pooled("norm"))),
    "timm.models.efficientnet.EfficientNet": Plan(
        "conv_stem bn1", "blocks", "conv_head bn2 global_pool", "classifier",
        pool=_pooled("conv_head", "bn2")),
    "timm.models.mobilenetv3.MobileNetV3": Plan(
        "conv_stem bn1", "blocks", "global_pool conv_head norm_head act2 flatten", "classifier",
        pool=_pooled()),
    "torchvision.models.resnet.ResNet": Plan(
        "conv1 bn1 relu maxpool", _LAYERS, "avgpool", "fc",
        pool=lambda n, x: n.avgpool(x).flatten(1)),
    "torchvision.models.vision_transformer.VisionTransformer": Plan(
        "conv_proj class_token encoder.pos_embedding encoder.dropout", "encoder.layers",
        "encoder.ln heads.pre_logits heads.act", "heads.head", _torchvision_vit_embed,
        lambda n, x: n.heads(n.encoder.ln(x)[:, 0])),
    "torchvision.models.convnext.ConvNeXt": Plan(
        "features.0", _torchvision_staged, "avgpool classifier.0 classifier.1", "classifier.2"),
    "torchvision.models.swin_transformer.SwinTransformer": Plan(
        "features.0", _torchvision_staged, "norm permute avgpool flatten", "head"),
    **dict.fromkeys(
        ("torchvision.models.efficientnet.EfficientNet",
         "torchvision.models.mobilenetv2.MobileNetV2"),
        Plan("features.0", lambda n: _opened(n.features[1:]), "classifier.0", "classifier.1",
             pool=_flat)),
    "torchvision.models.mobilenetv3.MobileNetV3": Plan(
        "features.0", lambda n: _opened(n.features[1:]),
        "classifier.0 classifier.1 classifier.2", "classifier.3", pool=_flat),
    "open_clip.transformer.VisionTransformer": Plan(
        "conv1 class_embedding positional_embedding patch_dropout ln_pre",
        "transformer.resblocks", "attn_pool attn_pool_contrastive ln_post proj", "",
        lambda n, x: n._embeds(x), _clip_pool),
    "open_clip.modified_resnet.ModifiedResNet": Plan(
        "conv1 bn1 act1 conv2 bn2 act2 conv3 bn3 act3 avgpool", _LAYERS, "attnpool", ""),
}


def _split_sequential(net: nn.Sequential) -> tuple[list[nn.Module], nn.Module, nn.Module]:
    """nn.Sequential that ends in a Linear: a child with weights opens a stage, those without join
    the stage before; pooling and flattening before the Linear belong to the classifier."""
    *body, fc = net
    last: list[nn.Module] = []
    while body and not list(body[-1].parameters()):
        last.insert(0, body.pop())
    groups: list[list[nn.Module]] = []
    for m in body:
        if groups and not list(m.parameters()):
            groups[-1].append(m)
        else:
            groups.append([m])
    return [g[0] if len(g) == 1 else nn.Sequential(*g) for g in groups], nn.Sequential(*last), fc


def split_net(net: nn.Module) -> tuple[list[nn.Module], nn.Module, nn.Module]:
    """(stages, features, fc), where net(x) is fc(features(the stages one after another)).

    All are net's own modules; for an encoder fc passes the embeddings on.  Raises: UserError."""
    if isinstance(net, Tower):
        body, features, projection = split_net(net.visual)
        return body, nn.Sequential(features, projection), net.fc
    kind = f"{type(net).__module__}.{type(net).__name__}"
    if kind == "open_clip.timm_model.TimmModel":
        body, features, projection = split_net(net.trunk)
        return body, nn.Sequential(features, projection, net.head), nn.Identity()
    if type(net) is nn.Sequential and len(net):
        return _split_sequential(net)
    if kind not in PLANS:
        known = {}
        for package, *_, name in (k.split(".") for k in PLANS):
            known.setdefault(package, []).append(name)
        text = "; ".join(f"{package} {', '.join(names)}" for package, names in known.items())
        raise UserError(f"a {kind} cannot be cut into stages: known are {text}; or pass an "
                        "nn.Sequential of your own that ends in a Linear")
    plan = PLANS[kind]
    if callable(plan.blocks):
        body = plan.blocks(net)
    else:
        body = _opened(b for path in plan.blocks.split() for b in net.get_submodule(path))
    return ([Part(net, plan.stem.split(), plan.embed), *body],
            Part(net, plan.last.split(), plan.pool),
            net.get_submodule(plan.fc) if plan.fc else nn.Identity())


def stages(net: nn.Module) -> nn.Sequential:
    """The same function as net, as a list of cuttable stages whose last one is a Classifier.

    The stages hold net's own modules, not copies.  Raises: UserError for what cannot be cut."""
    if isinstance(net, Net):
        first, *rest = stages(net.net)
        return nn.Sequential(Part(net, ("mean", "std"), lambda n, x: n.prepare(x)), first, *rest)
    body, features, fc = split_net(net)
    if not body or not hasattr(fc, "out_features"):
        raise UserError(f"a {type(net).__module__}.{type(net).__name__} without a final Linear "
                        "layer cannot be cut: build it with classes=N")
    return nn.Sequential(*body, Classifier(features, fc))


def freeze(module: nn.Module) -> nn.Module:
    """The module in eval mode, without gradients."""
    return module.eval().requires_grad_(False)


def cut(net: nn.Module, tune: int) -> tuple[nn.Sequential, nn.Sequential]:
    """(frozen backbone, tail): the tail is the last `tune` stages and the classifier."""
    parts = stages(net)
    at = len(parts) - 1 - tune
    if at < 1:
        raise UserError(f"tune = {tune}: {getattr(net, 'name', type(net).__name__)} has "
                        f"{len(parts) - 1} stages, of which the first stays frozen")
    return freeze(parts[:at]), parts[at:]


# ==== 7. METHOD ====
# In: boundary features of x and x~, logits of both teachers.  Out: the losses of [A] eq. 3-5, and
# at inference the head that answers ([A] eq. 6).  Always: the frozen part stays equal bit for bit.

HEADS = ("clean", "combined", "robust")


class Heads(NamedTuple):
    """Logits of the three heads, (B,C) each."""
    clean: Tensor
    combined: Tensor
    robust: Tensor


class Prediction(NamedTuple):
    """probs (B,C) of the answering head; head (B,) index into HEADS.

    sigma, kl (B,2): of the clean and the robust head."""
    probs: Tensor
    head: Tensor
    sigma: Tensor
    kl: Tensor


class Dropout(nn.Module):
    """Dropout with three modes: training (random), off, and sampling, T passes as one batch.

    Sampling draws T masks from the key alone and gives every image the same T masks: T
    sub-networks, so that a prediction does not depend on the other images of its batch."""

    def __init__(self, p: float, key: int):
        super().__init__()
        self.p, self.key = p, key
        self.sample = None                 # (passes T, images B that are not repeated yet), or off
        self.masks = torch.empty(0)                          # the last masks drawn, (T, *features)

    def forward(self, x: Tensor) -> Tensor:
        if self.sample is None:
            return F.dropout(x, self.p, self.training)
        t, b = self.sample
        if x.shape[0] == b:
            x = x.repeat(t, *[1] * (x.ndim - 1))
        if self.masks.shape != (t, *x.shape[1:]) or self.masks.device != x.device:
            masks = torch.rand(t, *x.shape[1:], generator=rng("mask", self.key)) >= self.p
            self.masks = (masks / (1 - self.p)).to(x.device)
        return (x.unflatten(0, (t, -1)) * self.masks[:, None].to(x.dtype)).flatten(0, 1)


def put_dropout(stage: nn.Module, p: float, key: int) -> nn.Module:
    """The stage with live dropout of rate p: its own dropout layers where it has some (pretrained
    networks carry none, or some with rate 0), else the ends of its residual branches where it is
    a block of open_clip, else one behind it."""
    children = [(m, k, c) for m in stage.modules() for k, c in m.named_children()]
    spots = ([(m, k, c) for m, k, c in children
              if isinstance(c, nn.Dropout) and k != "attn_drop"]  # a fused kernel reads attn_drop.p
             or [(m, k, c) for m, k, c in children if k in ("ls_1", "ls_2")])
    for i, (module, name, child) in enumerate(spots):
        drop = Dropout(p, fold(key, i))
        setattr(module, name, drop if isinstance(child, nn.Dropout) else nn.Sequential(child, drop))
    return stage if spots else nn.Sequential(stage, Dropout(p, fold(key)))


class Tuned(nn.Module):
    """Base of trained parts on a frozen network: in training mode only dropout is switched on, so
    BatchNorm keeps the statistics of the pretrained network."""

    def train(self, mode: bool = True):
        super().train(False)
        for m in self.modules():
            if isinstance(m, Dropout):
                m.training = mode
        self.training = mode
        return self


class Tail(Tuned):
    """The tail as it is: the part that the baselines train."""

    def __init__(self, tail: nn.Sequential):
        super().__init__()
        self.tail = tail

    def forward(self, f: Tensor) -> Tensor:
        return self.tail(f)


class ThreeHeads(Tuned):
    """Shared tail with dropout and three heads; the only part of a Student that is trained."""

    def __init__(self, tail: nn.Sequential, head: int, dropout: float, dropout_in: str):
        super().__init__()

        def with_dropout(stage: nn.Module, key: int) -> nn.Module:
            stage = copy.deepcopy(stage).requires_grad_(True)
            if isinstance(stage, Classifier):
                stage.drop = Dropout(dropout, key)
                return stage
            return put_dropout(stage, dropout, key) if dropout_in == "tail" else stage

        n = len(tail) - 1 - head
        self.shared = nn.Sequential(*(with_dropout(s, i) for i, s in enumerate(tail[:n])))
        self.heads = nn.ModuleDict({name: nn.Sequential(
            *(with_dropout(s, fold(name, i)) for i, s in enumerate(tail[n:]))) for name in HEADS})

    def forward(self, f: Tensor, n_clean: int | None = None) -> Heads:
        """Logits of all heads; with n_clean the clean head sees f[:n_clean] alone, the robust head
        f[n_clean:] alone and the combined head everything, as [A] trains them."""
        f = self.shared(f)
        a, b = (slice(None),) * 2 if n_clean is None else (slice(n_clean), slice(n_clean, None))
        return Heads(self.heads["clean"](f[a]), self.heads["combined"](f),
                     self.heads["robust"](f[b]))


def divergence(mean: Tensor) -> Tensor:
    """KL(head || combined) of the clean and the robust head, (B,2) in nats, from mean (B,3,C)."""
    log = mean.float().clamp_min(1e-12).log()
    return (mean[:, ::2].float() * (log[:, ::2] - log[:, 1:2])).sum(-1).clamp_min(0)


TINY = 1e-12
# The head with the least objective answers ([A] eq. 6).  s sigma, d divergence, m mean, z logits,
# all of the clean and the robust head.
OBJECTIVES: dict[str, Callable] = {
    "product": lambda s, d, m, z: (s + TINY) * (d + TINY),
    "sum": lambda s, d, m, z: s + d,
    "sigma": lambda s, d, m, z: s,
    "kl": lambda s, d, m, z: d,
    "max-logit": lambda s, d, m, z: -z.amax(-1),
    "max-prob": lambda s, d, m, z: -m.amax(-1),
    "entropy": lambda s, d, m, z: -(m * m.clamp_min(TINY).log()).sum(-1),
    "soft": lambda s, d, m, z: (s + TINY) * (d + TINY),
}
RULES = (*OBJECTIVES, *HEADS, "oracle")
NEEDS_SIGMA = ("product", "sum", "sigma", "soft")


def select(mean: Tensor, sigma: Tensor, rule: str = "product", *, logits: Tensor | None = None,
           y: Tensor | None = None) -> Tensor:
    """Index into HEADS of the head that answers each image, (B,).

    Shapes: mean (B,3,C) probabilities in the order of HEADS, sigma (B,2) of clean and robust,
    logits (B,3,C) for "max-logit", labels y (B,) for "oracle" (clean unless only robust is right).
    Paper: [A] eq. 6; product or sum, the direction of the KL and the reduction of sigma are ours.
    Raises: UserError on an unknown rule, on sigma = 0 everywhere, on a missing input."""
    choose(dict.fromkeys(RULES), rule, "rule")
    if rule in HEADS:
        return torch.full((len(mean),), HEADS.index(rule), device=mean.device)
    if rule == "oracle":
        if y is None:
            raise UserError("rule 'oracle' needs the labels")
        right = mean[:, ::2].argmax(-1) == y[:, None]                                    # (B,2)
        return torch.where(right[:, 1] & ~right[:, 0], 2, 0)
    if rule in NEEDS_SIGMA and not sigma.any():
        raise UserError(f"rule {rule!r}: sigma is 0 everywhere, there is no live dropout")
    if rule == "max-logit" and logits is None:
        raise UserError("rule 'max-logit' needs the logits")
    z = None if logits is None else logits[:, ::2]
    return 2 * OBJECTIVES[rule](sigma, divergence(mean), mean[:, ::2], z).argmin(-1)


def answer(mean: Tensor, sigma: Tensor, head: Tensor, rule: str) -> Tensor:
    """Probabilities (B,C) of the answering head; "soft" mixes clean and robust by 1/(sigma KL)."""
    if rule != "soft":
        return mean[torch.arange(len(mean), device=mean.device), head]
    weight = 1 / OBJECTIVES["product"](sigma, divergence(mean), None, None)
    weight = weight / weight.sum(-1, keepdim=True)
    return (mean[:, ::2] * weight[..., None]).sum(1)


class Student(nn.Module):
    """[A] fig. 2: a frozen network whose last `tune` stages are tuned, with three heads.

    net: the pretrained network; its modules become the frozen backbone and clean head's teacher.
    tune: stages tuned; head: of these the last ones that each head has for itself.
    dropout_in: "tail" as [A] (tuned stages and classifiers), "head" = before the classifiers only.
    text: a text head in the place of the net's classifier, for a visual tower of your own.
    forward(x) -> Heads; x (B,3,H,W) as net takes it."""

    def __init__(self, net: nn.Module, tune: int = 2, head: int = 2, dropout: float = 0.1,
                 classes: int | None = None, text: TextHead | None = None, *,
                 dropout_in: str = "tail"):
        super().__init__()
        if not 0 <= head <= tune:
            raise UserError(f"head = {head}: expected 0 to tune = {tune}")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout = {dropout}: expected 0 or more and less than 1")
        self.backbone, tail = cut(net, tune)
        if text is not None:
            tail[-1].fc = text
        if isinstance(tail[-1].fc, Embedding):
            raise UserError(f"{getattr(net, 'name', type(net).__name__)} gives embeddings: build "
                            "it with classes, or pass text=TextHead(...)")
        self.tuned = ThreeHeads(tail, head, dropout, dropout_in)
        self.original = freeze(tail)
        self.n_classes, self.dropout, self.name = (
            tail[-1].fc.out_features, dropout, getattr(net, "name", ""))
        self.view, self.size_px = getattr(net, "view", View()), getattr(net, "size_px", 0)
        if classes not in (None, self.n_classes):
            raise UserError(f"the network has {self.n_classes} outputs for {classes} classes: "
                            "train a head of that size first (pretrain with tune=0)")
        self.meta = {"tune": tune, "head": head, "dropout": dropout, "dropout_in": dropout_in}
        self.prompts, self.towers = getattr(net, "prompts", None), getattr(net, "towers", {})

    def train(self, mode: bool = True):
        self.training = mode
        self.tuned.train(mode)
        return self

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Boundary features of the frozen backbone."""
        return self.backbone(x)

    def forward(self, x: Tensor) -> Heads:
        return self.tuned(self.features(x))

    @contextlib.contextmanager
    def _sampling(self, f: Tensor, passes: int):
        """Context in which tuned(f') draws `passes` masks; f' is f, repeated for each pass where
        dropout stands in the stages (in residual branches too), else the classifiers repeat it."""
        early = self.meta["dropout_in"] == "tail" and self.meta["tune"] > 0
        drops = [m for m in self.tuned.modules() if isinstance(m, Dropout)]
        for d in drops:
            d.sample = (passes, 0 if early else f.shape[0])
        try:
            yield f.repeat(passes, *[1] * (f.ndim - 1)) if early else f
        finally:
            for d in drops:
                d.sample = None

    @torch.no_grad()
    def moments(self, f: Tensor, passes: int = 10, project: Project | None = None) \
            -> tuple[Tensor, Tensor, Tensor]:
        """(mean probabilities (B,3,C), sigma (B,2), mean logits (B,3,C)) from boundary features f.

        sigma: standard deviation over the dropout passes of the probability of the class that the
        head predicts, of the clean and robust head.  passes = 0: closed form, exact to first order
        for dropout before the classifiers, without randomness; dropout in the stages is then off.
        project: the outputs that count, for sets of fewer classes.
        Paper: [A] section 3.3; differs: all images share the T masks."""
        mode = self.training
        self.eval()
        out = self._sampled(f, passes, project) if passes else self._closed_form(f, project)
        self.train(mode)
        return out

    def _sampled(self, f: Tensor, passes: int, project: Project | None) \
            -> tuple[Tensor, Tensor, Tensor]:
        with self._sampling(f, passes) as repeated:
            z = torch.stack([h.float().unflatten(0, (passes, -1)) for h in self.tuned(repeated)], 2)
        z = project(z) if project else z
        p = z.softmax(-1)                                                        # (T,B,3,C)
        mean = p.mean(0)
        top = mean.argmax(-1, keepdim=True).expand(len(p), -1, -1, -1)
        sigma = p.gather(-1, top)[..., 0].std(0, correction=0)                   # (B,3)
        return mean, sigma[:, ::2], z.mean(0)

    def _closed_form(self, f: Tensor, project: Project | None) -> tuple[Tensor, Tensor, Tensor]:
        f = self.tuned.shared(f)
        moments = [self._closed_head(self.tuned.heads[name], f, project) for name in HEADS]
        z = torch.stack([z for z, _ in moments], 1)
        return z.softmax(-1), torch.stack([sigma for _, sigma in moments[::2]], 1), z

    def _closed_head(self, head: nn.Sequential, f: Tensor, project: Project | None) \
            -> tuple[Tensor, Tensor]:
        *blocks, last = head
        h = last.features(nn.Sequential(*blocks)(f)).float()                         # (B,D)
        with torch.autocast(f.device.type, enabled=False):   # a difference of near equals below
            w, z = last.fc.weight.float(), last.fc(h)
            at = project.winners(z) if project else torch.arange(z.shape[-1]).to(z.device).expand(
                z.shape)                                                             # (B,C)
            whole, z = z, z.gather(-1, at)
            p = z.softmax(-1)
            # d p_top / d h = p_top (w_top - sum_j p_j w_j); dropout moves h_i by variance h_i^2 q
            p_top, top = p.max(-1, keepdim=True)
            mean_w = torch.zeros_like(whole).scatter(-1, at, p) @ w
            grad = p_top * (w[at.gather(-1, top)[:, 0]] - mean_w)                    # (B,D)
            grad = last.fc.pull(h, grad) if isinstance(last.fc, TextHead) else grad
            q = self.dropout / (1 - self.dropout)
            return z, (q * (grad * h).square().sum(-1)).sqrt()

    def predict(self, x: Tensor, passes: int = 10, rule: str = "product") -> Prediction:
        """What the chosen head says.  passes: dropout passes in one batch after one pass of the
        backbone; 0 = closed form.  rule: one of RULES that needs no label.

        Raises: UserError when the rule needs sigma and there is no live dropout."""
        if rule in NEEDS_SIGMA and self.dropout == 0:
            raise UserError(f"rule {rule!r} needs sigma, which is 0 without dropout: set dropout "
                            "above 0")
        mean, sigma, logits = self.moments(self.features(x), passes)
        head = select(mean, sigma, rule, logits=logits)
        return Prediction(answer(mean, sigma, head, rule), head, sigma, divergence(mean))


# ---- losses --------------------------------------------------------------------------------------

def distillation(z: Tensor, teacher: Tensor, t: float) -> Tensor:
    """t^2 KL(softmax(teacher/t) || softmax(z/t)), in float32, the batch's mean."""
    log_p, log_q = (F.log_softmax(v.float() / t, -1) for v in (teacher, z))
    return t * t * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def head_loss(z: Tensor, teacher: Tensor, y: Tensor, alpha: float, t: float,
              smoothing: float = 0.0) -> Tensor:
    """(1-a) CE(z, y) + a t^2 KL(softmax(teacher/t) || softmax(z/t)), in float32, the batch's mean.

    Paper: [A] eq. 3-4, "weighted sum of classification and distillation loss"; the form is ours."""
    ce = F.cross_entropy(z.float(), y, label_smoothing=smoothing)
    return (1 - alpha) * ce + alpha * distillation(z, teacher, t)


def erpm_loss(z: Heads, z0: Tensor, zt: Tensor, y: Tensor, *, alpha: float, t: float,
              smoothing: float = 0.0) -> dict:
    """{part: loss} of a batch of b clean and b augmented images; their sum is minimised.

    Shapes: z.clean, z.robust (b,C), z.combined (2b,C) clean first; z0 = initial model on the clean,
    zt = robust teacher on the augmented images, (b,C) each; y (b,).
    Paper: [A] eq. 5 = eq. 3 + eq. 4."""
    loss = functools.partial(head_loss, y=y, alpha=alpha, t=t, smoothing=smoothing)
    b = len(y)
    # METHOD [A] eq. 3: clean images, teacher = the initial model
    clean = {"clean": loss(z.clean, z0), "combined_clean": loss(z.combined[:b], z0)}
    # METHOD [A] eq. 4: augmented images, teacher = the robust small model
    robust = {"robust": loss(z.robust, zt), "combined_robust": loss(z.combined[b:], zt)}
    return clean | robust


def anchor_loss(z: Heads, z0: Tensor, t: float) -> Tensor:
    """Distillation into every head of what the initial model says of the clean images over a wide
    vocabulary of texts: it keeps the space in which classes are named that tuning never shows.

    Shapes: as erpm_loss, with one column a text.  Not in [A]."""
    return (distillation(z.clean, z0, t) + distillation(z.robust, z0, t)
            + distillation(z.combined, z0.repeat(2, 1), t))


def contrastive_loss(z: Tensor, pair: Tensor, entails: Tensor) -> Tensor:
    """Symmetric cross-entropy of images and captions, each true pair against the false ones.

    Shapes: z (B,K) scaled cosines; pair (B,) each image's caption; entails (K,K): caption i says
    all that caption j says.  A caption that an image's own entails is true of it too, one that
    entails its own may be, and counts neither way; without such captions this is CLIP's loss."""
    true = entails[pair]                                                             # (B,K)
    false = z.masked_fill(true | entails.T[pair], torch.finfo(z.dtype).min)
    loss = F.softplus(false.logsumexp(1, True) - z) + F.softplus(false.logsumexp(0, True) - z)
    return loss[true].mean() / 2


# ---- files of trained networks -------------------------------------------------------------------

def describe(module: nn.Module, **more) -> dict:
    """The meta from which `load` builds the module again."""
    student = {"student": module.meta} if isinstance(module, Student) else {}
    text = {"prompts": dataclasses.asdict(module.prompts), "towers": module.towers} \
        if module.prompts else {}
    return {"name": module.name, "classes": module.n_classes, "size_px": module.size_px, **student,
            **text, **more}


def run_file(run: str | Path) -> Path:
    """The weights file of a run's folder, or the file itself.  Raises: UserError."""
    path = Path(run) / "model.safetensors" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        others = sorted(str(p.parent) for p in Path("runs").glob("*/model.safetensors"))
        raise UserError(f"no trained model {path}: run `python erpm.py distill` first, or name a "
                        "run's folder that holds model.safetensors"
                        + f" ({', '.join(others)})" * bool(others))
    return path


def load(run: str | Path) -> nn.Module:
    """The Student (or plain network) that a run made, in eval mode, ready for `predict`.

    run: a run's folder (its model.safetensors) or a weights file.  Nothing is downloaded.
    Raises: UserError."""
    path = run_file(run)
    meta = read_meta(path)
    if not {"name", "classes"} <= set(meta):
        raise UserError(f"{path} was not written by erpm.py: use "
                        f"build(NAME, weights={str(path)!r})")
    prompts = Prompts(**meta["prompts"]) if "prompts" in meta else None
    if "both towers" in meta:
        return freeze(zero_shot_net(meta["name"], prompts, str(path)))
    net = named(meta["name"], None if prompts else meta["classes"], "random")
    net.size_px = meta["size_px"]
    if prompts:
        towers, width = dict(meta["towers"]), net.net.fc.out_features
        moved = path.with_name(Path(towers["file"]).name)            # a run's folder may be moved
        if towers["file"] and not Path(towers["file"]).is_file() and moved.is_file():
            towers["file"] = str(moved)
        net = _text_headed(net, TextHead(torch.zeros(meta["classes"], width), 0), prompts, towers)
    module = Student(net, **meta["student"]) if "student" in meta else net
    load_weights(module, path)
    return freeze(module)


def with_text(model: nn.Module, weight: Tensor, prompts: Prompts | None = None) -> nn.Module:
    """The same zero-shot network or Student for other classes: all weights are shared, the class
    embeddings (C,D) are new."""
    out = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    for head in (m for m in out.modules() if isinstance(m, TextHead)):
        head.weight = F.normalize(weight.float(), dim=-1).to(head.weight.device)
    out.n_classes, out.prompts = len(weight), prompts
    return out


def build(name: str | nn.Module, classes: int | Sequence[str] | Prompts | None = None,
          weights: str | None = None) -> nn.Module:
    """The network of that name, in eval mode.

    name: "timm:resnet50.tv_in1k", "torchvision:resnet50/IMAGENET1K_V1",
    "open_clip:ViT-B-32-quickgelu/openai" (a tag loads its pretrained weights), "cifar:resnet20-w2",
    "run:runs/x" (what that run made), or your own module, which is returned as it is.
    classes: number of outputs; None = the network's own.  A tag of other classes, or a file of an
    encoder alone, comes with a new classifier.  Names of classes, or Prompts (names and templates),
    make a zero-shot network of one with a text tower.
    weights: a file of ours, .safetensors or a plain state dict of torch.save, of the network or
    for open_clip of the whole CLIP model (OpenAI's archives too), loaded strictly; "random" = none.
    Raises: UserError on an unknown name and on weights that do not fit."""
    if isinstance(name, nn.Module):
        return name
    if name.startswith("run:"):
        return load(name[4:])
    if classes is None or isinstance(classes, int):
        return named(name, classes, weights)
    prompts = classes if isinstance(classes, Prompts) else Prompts(tuple(classes))
    return zero_shot_net(name, prompts, weights)


# ==== 8. TRAINING ====
# In: a module, step(model, batch) -> (loss, {name: 0-d tensor}) and images.  Out: trained weights
# and log.jsonl.  Always: an interrupted run goes on to the same weights, on a CPU bit for bit.


class Batch(NamedTuple):
    """x uint8 (B,3,H,W), y (B,), and a CPU generator that is a function of (seed, step, rank)."""
    x: Tensor
    y: Tensor
    generator: torch.Generator


def amp_type(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type; "auto" = bf16 where the hardware has it, fp16 on older GPUs, else None."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    elif amp == "auto":
        amp = "bf16" if torch.cpu._is_avx512_bf16_supported() else "none"
    if amp == "fp16" and device.type == "cpu":
        raise UserError("runtime.amp: fp16 needs a GPU; take bf16, none or auto")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[amp]


def autocast(amp: str, device: torch.device):
    """Autocast context of amp_type."""
    dtype = amp_type(amp, device)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def lr_at(step: int, total: int, warmup: float, peak: float) -> float:
    """Learning rate of a step: linear from 0 over `warmup` steps, then a cosine to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def make_optimizer(model: nn.Module, cfg: Train) -> torch.optim.Optimizer:
    """AdamW or SGD; weight decay on matrices only."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim > 1], "weight_decay": cfg.weight_decay},
              {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}]
    make = choose({"adamw": torch.optim.AdamW,
                   "sgd": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)},
                  cfg.optimizer, "optimizer")
    return make(groups, lr=cfg.lr)


class Signals:
    """Context in which Ctrl-C and SIGTERM only set `hit`, for the loop to stop at a safe point."""

    def __enter__(self):
        self.hit = 0
        self.old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        if self.hit and number == signal.SIGINT:             # a second Ctrl-C is impatient
            raise KeyboardInterrupt
        self.hit = number

    def __exit__(self, *exc):
        for s, handler in self.old.items():
            signal.signal(s, handler)


def differences(old: dict, new: dict, path: str = "") -> str:
    """What differs between two nested mappings, as "a.b: 1 -> 2", or ""."""
    found = []
    for k in sorted({*old, *new}):
        a, b = old.get(k), new.get(k)
        if isinstance(a, dict) and isinstance(b, dict):
            found.append(differences(a, b, f"{path}{k}."))
        elif a != b:
            found.append(f"{path}{k}: {a} -> {b}")
    return ", ".join(f for f in found if f)


class TrainState:
    """Model, optimizer, scaler, averaged weights and step: all that a checkpoint holds."""

    def __init__(self, model: nn.Module, cfg: Train, scale: bool, path: Path, key: dict):
        self.model, self.cfg, self.path, self.key = model, cfg, path, key
        self.opt = make_optimizer(model, cfg)
        self.scaler = torch.amp.GradScaler(enabled=scale)
        self.step, self.seconds = 0, 0.0
        self.ema = {k: v.clone() for k, v in model.state_dict().items()} if cfg.ema else {}

    def save(self) -> None:
        """Writes the checkpoint, on the first process only."""
        tensors = {"model": self.model.state_dict(), "opt": self.opt.state_dict(), "ema": self.ema,
                   "scaler": self.scaler.state_dict(), "step": self.step, "seconds": self.seconds,
                   "key": json.dumps(self.key)}
        if world()[0] == 0:
            write_atomically(self.path, lambda p: torch.save(tensors, p))

    def resume(self, device: torch.device) -> None:
        """Goes to the checkpoint's step, if any.  Raises: UserError if it is another job's."""
        if not self.path.is_file():
            return
        try:
            saved = torch.load(self.path, map_location=device, weights_only=True)
        except Exception as e:                               # truncated, foreign, or a pickle
            raise UserError(f"{self.path} is damaged ({type(e).__name__}): delete it to start this "
                            "stage again") from None
        changed = differences(json.loads(saved["key"]), self.key)
        if changed:
            raise UserError(f"{self.path} is a half-done job with other settings ({changed}): "
                            "finish it with those, delete it, or take another run=NAME")
        self.model.load_state_dict(saved["model"])
        self.opt.load_state_dict(saved["opt"])
        self.scaler.load_state_dict(saved["scaler"])
        self.ema, self.step, self.seconds = saved["ema"], saved["step"], saved["seconds"]

    def update(self, lr: float) -> None:
        """One optimizer step on the gradients that have been summed."""
        for group in self.opt.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.opt)
        if self.cfg.clip:
            nn.utils.clip_grad_norm_((p for g in self.opt.param_groups for p in g["params"]),
                                     self.cfg.clip)
        self.scaler.step(self.opt)
        self.scaler.update()
        self.opt.zero_grad(set_to_none=True)
        self.step += 1
        for k, v in (self.model.state_dict() if self.ema else {}).items():
            if v.is_floating_point():
                self.ema[k].lerp_(v, 1 - self.cfg.ema)
            else:
                self.ema[k].copy_(v)


def read_jsonl(path: Path) -> list[dict]:
    """The file's rows; none if it is absent.  A last line cut off by a crash is dropped."""
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = []
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if i + 1 < len(lines):
                raise UserError(
                    f"{path}, line {i + 1}: not JSON; mend or delete the line") from None
    return rows


class Meter:
    """Means of an interval of steps -> log.jsonl and the terminal.

    A resumed stage drops the lines that lie ahead of it: they will be written again."""

    def __init__(self, path: Path, stage: str, state: TrainState, total: int, cfg: Train):
        self.path, self.stage, self.state, self.total, self.cfg = path, stage, state, total, cfg
        self.sums: dict[str, Tensor] = {}
        self.since, self.first = time.perf_counter(), state.step
        if world()[0] == 0:
            keep = [json.dumps(r) + "\n" for r in read_jsonl(path)
                    if r["stage"] != stage or 0 < r["step"] <= state.step]
            write_atomically(path, lambda p: p.write_text("".join(keep)))

    def add(self, parts: dict[str, Tensor]) -> None:
        """Adds the losses of a micro-batch, without waiting for the device."""
        for k, v in parts.items():
            self.sums[k] = self.sums.get(k, 0) + v.detach() / self.cfg.accum

    def flush(self, lr: float, per_epoch: int, quiet: bool) -> None:
        """Writes the interval's line.  Raises: UserError on a loss that is not finite."""
        step, now = self.state.step, time.perf_counter()
        n, seconds = step - self.first, now - self.since
        means = {k: round(float(v) / n, 5) for k, v in self.sums.items()}
        if not all(map(math.isfinite, means.values())):
            raise UserError(f"{self.stage}: the loss is not finite at step {step} ({means}); the "
                            f"last checkpoint stands; try a smaller {self.stage}.lr or "
                            "runtime.amp=none")
        self.state.seconds += seconds
        rate = n * self.cfg.batch / seconds
        row = {"stage": self.stage, "step": step, "epoch": round(step / per_epoch, 3), "lr": lr,
               "images_per_s": round(rate, 1), **means}
        if world()[0] == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
        if not quiet:
            say(f"{self.stage} step {step}/{self.total} loss {means['loss']:.4f} {rate:.0f} "
                f"images/s {(self.total - step) * self.cfg.batch / rate:.0f} s left")
        self.sums, self.since, self.first = {}, now, step


def _agreed(flag: bool, device: torch.device) -> bool:
    """Whether any process raised its flag."""
    if world()[1] == 1:
        return flag
    t = torch.tensor(float(flag), device=device)
    dist.all_reduce(t)
    return bool(t)


def _micro_step(model, step, data, state: TrainState, runtime: Runtime, device: torch.device, *,
                seed: tuple, last: bool) -> dict[str, Tensor]:
    """Losses of one micro-batch, whose gradients are added up."""
    x, y, _ = data
    torch.manual_seed(fold("dropout", *seed))              # dropout draws from the global generator
    batch = Batch(x.to(device, non_blocking=True), y.to(device, non_blocking=True),
                  rng("step", *seed))
    sync = contextlib.nullcontext() if last or world()[1] == 1 else model.no_sync()
    with sync:
        with autocast(runtime.amp, device):
            loss, parts = step(model, batch)
        state.scaler.scale(loss / state.cfg.accum).backward()
    return {"loss": loss, **parts}


def fit(model: nn.Module, step: Callable, images: ImageSet, cfg: Train, runtime: Runtime, *,
        out: Path, name: str, seed: int, key: dict, workers: int = 0) -> dict[str, float]:
    """Trains the module in place and returns {"images", "seconds"} of the training.

    step(model, Batch) -> (loss, {name: 0-d tensor}) makes one forward through `model`, which is
    the module or its DDP wrapper.  out/NAME.ckpt is where it goes on if it was interrupted; key
    tells whose checkpoint that is.
    Raises: UserError on a loss that is not finite; Interrupted on a signal."""
    device, (rank, size), seed = pick_device(), world(), fold(seed, name)
    model.to(device).train()
    batches = Batches(len(images), cfg.batch // cfg.accum, seed)
    per_epoch = max(1, batches.per_epoch // cfg.accum)
    total = max(1, round(cfg.epochs * per_epoch))
    state = TrainState(model, cfg, amp_type(runtime.amp, device) == torch.float16,
                       out / f"{name}.ckpt", key)
    state.resume(device)
    batches.start = state.step * cfg.accum
    wrapped = model if size == 1 else nn.parallel.DistributedDataParallel(model)
    data = iter(loader(images.training(seed), batches, workers))
    meter = Meter(out / "log.jsonl", name, state, total, cfg)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    copies = 2 + {"adamw": 2, "sgd": 1}[cfg.optimizer] + bool(cfg.ema)
    say(f"{name}: {len(images):,} images, {total:,} steps of {cfg.batch}, {n_trained:,} trained "
        f"parameters ({4e-6 * copies * n_trained:.1f} MB with gradients and optimizer state)"
        + (f"; goes on at step {state.step:,}" if state.step else ""))
    bar = progress(total * cfg.batch, name, state.step * cfg.batch)
    with Signals() as signals, bar:
        while state.step < total:
            lr = lr_at(state.step, total, cfg.warmup * per_epoch, cfg.lr)
            for k in range(cfg.accum):
                meter.add(_micro_step(wrapped, step, next(data), state, runtime, device,
                                      seed=(seed, state.step, k, rank), last=k == cfg.accum - 1))
            state.update(lr)
            bar.update(cfg.batch)
            at_save = state.step % runtime.save_every == 0 and state.step < total
            at_log = state.step % runtime.log_every == 0 or state.step == total
            if at_log or at_save or size == 1 and signals.hit:
                tenth = state.step % (10 * runtime.log_every) == 0 or state.step == total
                meter.flush(lr, per_epoch, quiet=not bar.disable or not tenth)
                if _agreed(bool(signals.hit), device):
                    state.save()
                    barrier()
                    raise Interrupted(f"{name} stopped at step {state.step} of {total}; the same "
                                      "command goes on from here")
            if at_save:
                state.save()
    if state.ema:
        model.load_state_dict(state.ema)
    model.eval()
    return {"images": total * cfg.batch, "seconds": round(state.seconds, 2)}


# ---- the steps of the methods --------------------------------------------------------------------

def harden(x: Tensor, cfg: Robustify, generator: torch.Generator) -> Tensor:
    """x~: the images under the robust teacher's augmentation."""
    strength = (0.1, 0.3) if x.shape[-1] <= 64 else (0.375, 0.75)    # small detail drowns sooner
    return augment(x, cfg.augment, generator, augmix={"severity": cfg.severity},
                   pixmix={"pictures": cfg.pictures or None}, deepaugment={"strength": strength})


def clean_step(smoothing: float) -> Callable:
    """Cross-entropy on the clean images."""
    def step(model, batch):
        return F.cross_entropy(model(batch.x).float(), batch.y, label_smoothing=smoothing), {}
    return step


def contrastive_step(captions: Sequence[str]) -> Callable:
    """Contrastive training of a TinyClip; the labels of the images are places in captions."""
    every = word_ids(captions)

    def step(model, batch):
        used, pair = batch.y.unique(return_inverse=True)
        words = every[used.cpu()].to(batch.x.device)
        return contrastive_loss(model(batch.x, words), pair, entailment(words)), {}
    return step


def robust_step(cfg: Robustify, n_classes: int) -> Callable:
    """AugMix training: cross-entropy on the clean view and JSD over three views; jsd = 0: cross-
    entropy on clean and augmented views.  mixup and cutmix mix images and labels before that."""
    ce = functools.partial(F.cross_entropy, label_smoothing=cfg.smoothing)
    mixes = spec_names(cfg.augment) & set(LABEL_MIXERS)

    def step(model, batch):
        x, y, g = batch
        if mixes:
            x, y = mix_labels(x, y, cfg.augment, g, n_classes)
        n_views = 2 if cfg.jsd else 1
        views = [harden(x, cfg, g) for _ in range(n_views)]
        z = model(torch.cat([x, *views])).float().chunk(1 + n_views)
        if not cfg.jsd:
            return ce(torch.cat(z), torch.cat([y, y])), {}
        loss, consistency = ce(z[0], y), jsd(*z)
        return loss + cfg.jsd * consistency, {"ce": loss, "jsd": consistency}
    return step


def erpm_step(student: Student, teacher: nn.Module, cfg: Distill, aug: Robustify) -> Callable:
    """METHOD [A]: one frozen pass of clean and augmented views, then the losses of eq. 3-5."""
    def step(model, batch):
        x, y, g = batch
        b, xa = len(x), harden(x, aug, g)
        f = student.features(torch.cat([x, xa]))
        with torch.no_grad():
            z0, zt = student.original(f[:b]), teacher(xa)
        z, c = model(f, b), zt.shape[-1]      # behind the classes: texts of the vocabulary, if any
        parts = erpm_loss(Heads(*(h[:, :c] for h in z)), z0[:, :c], zt, y, alpha=cfg.alpha,
                          t=cfg.temperature, smoothing=cfg.smoothing)
        if z0.shape[-1] > c:
            parts["anchor"] = cfg.anchor * anchor_loss(Heads(*(h[:, c:] for h in z)), z0[:, c:],
                                                       cfg.temperature)
        return sum(parts.values()), parts
    return step


def tail_step(backbone: nn.Module | None, cfg: Train, aug: Robustify | None) -> Callable:
    """Cross-entropy of a tail on a frozen backbone (APT, linear probes), on x, or on x and x~."""
    def step(model, batch):
        x, y, g = batch
        if aug is not None:
            x, y = torch.cat([x, harden(x, aug, g)]), y.repeat(2)
        with torch.no_grad():
            f = backbone(x)
        return F.cross_entropy(model(f).float(), y, label_smoothing=cfg.smoothing), {}
    return step


# ==== 9. EVALUATION ====
# In: networks, a set.  Out: exact integer sums, a row a cell (model, set, corruption, severity).
# Always: any number of processes gives the same figures; nothing is padded or counted twice.

FIXED_POINT = 2 ** 20      # means are summed as integers, so that the order of summing is no matter
N_BINS = 15                # of the calibration error


def label_rank(v: Tensor, y: Tensor) -> Tensor:
    """Number of classes before the label, 0 = top-1; of equals the first class is before, as in
    argmax, and NaN is before everything.  Shapes: scores v (B,K,C), labels y (B,) -> (B,K)."""
    y = y[:, None, None].expand(-1, v.shape[1], 1)                                       # (B,K,1)
    own, later = v.gather(-1, y), torch.arange(v.shape[-1], device=v.device) > y
    behind = (own > v) | (own == v) & later
    return v.shape[-1] - 1 - behind.sum(-1)


def tally(rank: Tensor, nll: Tensor, confidence: Tensor) -> Tensor:
    """Integer sums over a batch of K ways to answer, (K, 4 + 2 N_BINS): correct, in the top 5, NLL,
    not finite, then for each bin of confidence, (lo, hi], correct answers and confidence.

    Shapes: rank of the label, NLL in nats and confidence of the answer, (B,K) each.
    Source: calibration bins of Guo et al. 2017."""
    bad = ~(nll.isfinite() & confidence.isfinite())
    nll, conf = ((v.double().masked_fill(bad, 0) * FIXED_POINT).round().long()
                 for v in (nll, confidence))
    edges = torch.linspace(0, 1, N_BINS + 1, device=nll.device)[1:-1]
    at = torch.bucketize(confidence.float().contiguous(), edges).t()                    # (K,B)
    right = (rank == 0).long()
    bins = [torch.zeros(len(at), N_BINS, dtype=torch.long, device=at.device).scatter_add_(
        1, at, v.t()) for v in (right, conf)]
    sums = torch.stack([right.sum(0), (rank < 5).sum(0), nll.sum(0), bad.sum(0)], 1)
    return torch.cat([sums, *bins], 1)


def _rules_of(student: Student, passes: int) -> list[str]:
    """The rules that are scored: those that need sigma only where there is live dropout."""
    rules = [r for r in RULES if student.dropout or r not in NEEDS_SIGMA]
    return [*rules, *["product (closed form)"] * bool(passes and student.dropout)]


def _score_student(student: Student, x: Tensor, y: Tensor, project,
                   passes: int) -> dict[str, Tensor]:
    """Sums over the batch.  Each answer (three heads, their soft mixture, three heads in closed
    form) is looked at once; a rule then picks among these."""
    f, rules = student.features(x), _rules_of(student, passes)
    mean, sigma, logits = student.moments(f, passes, project)
    p, kl = [mean], divergence(mean)
    heads = [select(mean, sigma, r, logits=logits, y=y) for r in rules if r in RULES]
    picks = list(heads)
    if "soft" in rules:
        p.append(answer(mean, sigma, heads[0], "soft")[:, None])
        picks[rules.index("soft")] = torch.full_like(heads[0], 3)
    if len(rules) > len(heads):
        closed, spread, _ = student.moments(f, 0, project)
        p.append(closed)
        heads.append(select(closed, spread, "product"))
        picks.append(heads[-1] + 4)
    p, heads, picks = torch.cat(p, 1).float(), torch.stack(heads), torch.stack(picks, 1)
    own = p.gather(-1, y[:, None, None].expand(-1, p.shape[1], 1))[..., 0]
    facts = (label_rank(p, y), -own.clamp_min(torch.finfo(p.dtype).tiny).log(), p.amax(-1))
    shares = (heads[..., None] == torch.arange(3, device=heads.device)).sum(1)        # (rules,3)
    moments = (torch.cat([sigma, kl], 1).nan_to_num().double() * FIXED_POINT).round().long().sum(0)
    return {"answers": tally(*(v.gather(1, picks) for v in facts)), "heads": shares,
            "moments": moments}


def _score_plain(predict: Callable, x: Tensor, y: Tensor, project) -> dict[str, Tensor]:
    z = predict(x)
    z = (project(z) if project else z).float()[:, None]
    norm, own = z.logsumexp(-1), z.gather(-1, y[:, None, None])[..., 0]
    return {"answers": tally(label_rank(z, y), norm - own, (z.amax(-1) - norm).exp())}


def _figures(n: int, sums: list[int]) -> dict:
    """What a row of `tally`, summed over the set, says."""
    correct, correct5, nll, _, *bins = sums
    gap = sum(abs(FIXED_POINT * right - conf)
              for right, conf in zip(bins[:N_BINS], bins[N_BINS:]))
    return {"correct": correct, "correct5": correct5, "nll": round(nll / FIXED_POINT / n, 6),
            "ece": round(gap / FIXED_POINT / n, 6)}


def _results(label: str, model: Callable, n: int, passes: int, sums: dict[str, Tensor]) -> dict:
    """The sums of all processes as plain numbers.  Raises: UserError on outputs of NaN or inf."""
    flat = torch.cat([v.flatten() for v in sums.values()])
    if world()[1] > 1:
        dist.all_reduce(flat)
    flat = flat.cpu().split([v.numel() for v in sums.values()])
    parts = {k: f.view(v.shape).tolist() for (k, v), f in zip(sums.items(), flat)}
    bad = max(row[3] for row in parts["answers"])
    if bad:
        raise UserError(f"{label or 'the network'}: its outputs are not finite (NaN or inf) for "
                        f"{bad} of {n} images; try runtime.amp=none")
    if "heads" not in parts:
        return {"n": n, **_figures(n, parts["answers"][0])}
    rules = {rule: _figures(n, row) | {"heads": heads} for rule, row, heads in zip(
        _rules_of(model, passes), parts["answers"], parts["heads"])}
    moments = [round(v / FIXED_POINT / n, 6) for v in parts["moments"]]
    return {"n": n, "rules": rules, "sigma": moments[:2], "kl": moments[2:]}


def device_of(*models: Callable) -> torch.device:
    """Where the networks' parameters lie."""
    weights = (p for m in models if isinstance(m, nn.Module) for p in m.parameters())
    return next((p.device for p in weights), pick_device())


@torch.no_grad()
def evaluate_all(models: dict[str, Callable], images: ImageSet, cell: tuple[str, int] | None = None,
                 *, batch: int = 256, passes: int = 10, jpeg: bool = True, frost_dir: str = "",
                 amp: str = "auto", workers: int = 0, bar: tqdm | None = None) -> dict[str, dict]:
    """{label: figures} of several networks on the same pixels; see `evaluate`."""
    device = device_of(*models.values())
    totals: dict[str, dict[str, Tensor]] = {label: {} for label in models}
    project = images.project
    idle = world()[0] * batch >= len(images)   # no batch of its own: the first one, counted 0 times
    for x, y, index in eval_batches(images, batch, workers):
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        if cell:
            x = corrupt(x, *cell, index=index.tolist(), jpeg=jpeg, frost_dir=frost_dir or None)
        with autocast(amp, device):
            for label, model in models.items():
                sums = _score_student(model, x, y, project, passes) if isinstance(model, Student) \
                    else _score_plain(model, x, y, project)
                for k, v in sums.items():
                    totals[label][k] = totals[label].get(k, 0) + v * (not idle)
        if bar is not None:
            bar.update(len(x) * world()[1])
    return {label: _results(label, models[label], len(images), passes, sums)
            for label, sums in totals.items()}


def evaluate(predict: Callable, images: ImageSet | str, cell: tuple[str, int] | None = None,
             **options) -> dict:
    """Figures of a network on a set, exact for any number of processes: {"n", "correct",
    "correct5" (counts), "nll" (mean, nats), "ece" (15 bins)}, of the classes that the set scores.

    predict: any function from images uint8 (B,3,H,W) to logits; or a Student, then {"n", "rules":
    {rule: the same figures and "heads", the images that clean, combined and robust answered},
    "sigma", "kl" (means, of the clean and the robust head)}.
    images: an ImageSet, or the name of a set in ./data.  cell: (corruption, severity), made on the
    fly.  options: batch, passes, jpeg, amp, workers.
    Raises: UserError, on outputs that are not finite too."""
    images = open_set(images, Data()) if isinstance(images, str) else images
    return evaluate_all({"": predict}, images, cell, **options)[""]


def zero_shot(model: nn.Module, images: ImageSet, templates: str = "",
              cache: Path | None = None) -> nn.Module:
    """A network with a text head for the classes of that set; itself where these are its classes,
    and where it has no text head.

    templates: as prompts_of.  cache: folder that keeps class embeddings.
    Raises: UserError without the text tower's file."""
    if getattr(model, "prompts", None) is None:
        return model
    prompts = prompts_of(images, templates)
    if prompts == model.prompts:
        return model
    weight = class_embeddings(model.name, model.towers, prompts, cache)
    return with_text(model, weight, prompts)


# ---- linear probes -------------------------------------------------------------------------------

PROBE_L2 = tuple(10 ** (k / 2) for k in range(2, -13, -1))     # 10 ... 1e-6
PROBE_LOGITS = 2 ** 24                                         # at most in one chunk


def held_out(y: np.ndarray, seed: int = 0, share: float = 0.15) -> np.ndarray:
    """Whether an image is held out, (n,): that share of every class with two images or more, at
    least one, drawn by the seed."""
    order = np.lexsort((uniforms(seed, np.arange(len(y)), 1)[:, 0], y))
    _, first, count = np.unique(y[order], return_index=True, return_counts=True)
    quota = np.where(count > 1, np.maximum(1, np.round(share * count)), 0)
    out = np.zeros(len(y), bool)
    out[order] = np.arange(len(y)) - np.repeat(first, count) < np.repeat(quota, count)
    return out


def _softmax_loss(theta: Tensor, x: Tensor, y: Tensor, l2: float) -> Tensor:
    """Mean cross-entropy + l2/2 |W|^2 of theta = (W | b), chunk by chunk; its gradient, where it is
    asked for, is added to theta.grad.  Shapes: theta (C,D+1), x (n,D), y (n,)."""
    rows = max(1, PROBE_LOGITS // len(theta))
    total = torch.zeros((), device=theta.device, dtype=theta.dtype)
    for s in range(0, len(y), rows):
        xs, ys = x[s:s + rows].to(theta), y[s:s + rows].to(theta.device)
        part = F.cross_entropy(F.linear(xs, theta[:, :-1], theta[:, -1]), ys,
                               reduction="sum") / len(y)
        if theta.requires_grad:
            part.backward()
        total += part.detach()
    penalty = l2 / 2 * theta[:, :-1].square().sum()
    if theta.requires_grad:
        penalty.backward()
    return total + penalty.detach()


def _fit_softmax(theta: Tensor, x: Tensor, y: Tensor, l2: float, tolerance: float) -> Tensor:
    """The theta that minimises _softmax_loss, from a start; tolerance: of the largest gradient."""
    theta = theta.clone().requires_grad_()
    opt = torch.optim.LBFGS([theta], max_iter=1000, tolerance_grad=tolerance,
                            tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        opt.zero_grad()
        return _softmax_loss(theta, x, y, l2)

    with torch.enable_grad():
        opt.step(closure)
    return theta.detach()


def linear_probe(features: Tensor, y: Tensor, n_classes: int, *, seed: int = 0,
                 l2s: Sequence[float] = PROBE_L2) -> tuple[Tensor, Tensor, float]:
    """(weight (C,D), bias (C,), chosen l2) of a multinomial logistic regression on frozen features.

    It minimises mean cross-entropy + l2/2 |W|^2 on standardised features (the standardisation is
    then folded into weight and bias) by L-BFGS, full batch, in float64 on a CPU and float32 on a
    GPU.  l2: the one of l2s, from strong to weak with warm starts, with the least loss on a held
    out 15 %; refitted on all.  Two losses in a row above the least end the search.
    Shapes: features (n,D) float32 in any memory, labels y (n,)."""
    device = pick_device()
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    fits = device.type == "cpu" or features.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    out = torch.from_numpy(held_out(y.cpu().numpy(), seed))
    order = torch.cat([(~out).nonzero()[:, 0], out.nonzero()[:, 0]])         # held out come last
    var, mean = torch.var_mean(features, 0, correction=0)
    std = torch.where(var > 1e-12, var, 1.0).sqrt()
    x = torch.empty(features.shape, device=device if fits else "cpu", dtype=dtype)
    for s in range(0, len(x), 2 ** 14):
        x[s:s + 2 ** 14] = (features[order[s:s + 2 ** 14]] - mean) / std
    y = y[order].to(device)
    n = len(y) - int(out.sum())
    theta = torch.zeros(n_classes, x.shape[1] + 1, device=device, dtype=dtype, requires_grad=True)
    with torch.enable_grad():
        _softmax_loss(theta, x, y, 0.0)
    scale, theta = float(theta.grad.abs().max()), theta.detach()
    best, worse = (math.inf, l2s[0], theta), 0
    for l2 in l2s if n < len(y) else ():
        theta = _fit_softmax(theta, x[:n], y[:n], l2, 1e-2 * scale)
        loss = float(_softmax_loss(theta, x[n:], y[n:], 0.0))
        best, worse = ((loss, l2, theta), 0) if loss < best[0] else (best, worse + 1)
        if worse == 2:
            break
    theta = _fit_softmax(best[2], x, y, best[1], 1e-5 * scale).cpu()
    weight = theta[:, :-1] / std.cpu()
    bias = theta[:, -1] - weight @ mean.cpu().to(dtype)
    return weight.float(), bias.float(), best[1]


def frozen_features(model: nn.Module, head: str = "clean") -> nn.Module:
    """What stands before the last linear layer, images -> (B,D), of a plain network or of one head
    of a Student: clean, combined, robust, or original (before tuning).

    It holds the model's own modules and freezes them.  Raises: UserError on what cannot be cut."""
    if isinstance(model, Student):
        tail = [*model.original] if head == "original" else [
            *model.tuned.shared, *choose(dict(model.tuned.heads.items()), head, "head")]
        *body, last = [model.backbone, *tail]
    else:
        *body, last = stages(model)
    return freeze(nn.Sequential(*body, last.features))


@torch.no_grad()
def extract(features: nn.Module, images: ImageSet, *, batch: int = 256, amp: str = "auto",
            workers: int = 0) -> Tensor | None:
    """Features (n,D) float32 of a whole set, the same for any number of processes, in the first
    one's memory; None in the others.  Images come as they are scored: without augmentation."""
    device, (rank, size), out = device_of(features), world(), None
    batches, f = iter(eval_batches(images, batch, workers)), torch.empty(0)
    with progress(len(images), "features") as bar:
        for start in range(0, len(images), batch * size):
            found = next(batches, None)
            if found is not None:
                with autocast(amp, device):
                    f = features(found[0].to(device, non_blocking=True)).float()
                f = F.pad(f, (0, 0, 0, batch - len(f)))
            parts = [f]
            if size > 1:                                  # one without a batch sends an old one
                parts = [torch.empty_like(f) for _ in range(size)]
                dist.all_gather(parts, f)
            if rank == 0:
                out = torch.empty(len(images), f.shape[1]) if out is None else out
                here = out[start:start + batch * size]
                here.copy_(torch.cat(parts)[:len(here)])
            bar.update(min(batch * size, len(images) - start))
    return out


def from_first(make: Callable):
    """What make() gives on the first process, on every process: files are looked at once, and all
    do the same.  The others wait for as long as it takes (a collective gives up after minutes)."""
    if world()[1] == 1:
        return make()
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    box = [make() if world()[0] == 0 else None]
    dist.broadcast_object_list(box, 0, group)
    return box[0]


def fit_probe(features: nn.Module, images: ImageSet, *, seed: int = 0, **options) \
        -> tuple[Tensor, Tensor, float]:
    """linear_probe on what `features` makes of the set's images, on every process.

    options: batch, amp, workers."""
    x, y = extract(features, images, **options), torch.from_numpy(images.y[images.index])
    return from_first(lambda: linear_probe(x, y, len(images.classes), seed=seed))


def _kept_probe(cache: Path | None) -> tuple[Tensor, Tensor, float] | None:
    """(weight, bias, l2) from the file that `probed` left, if any."""
    if cache is None or not cache.is_file():
        return None
    with safe_open(cache, "pt") as f:
        return f.get_tensor("weight"), f.get_tensor("bias"), read_meta(cache)["l2"]


def probed(model: nn.Module, images: ImageSet, head: str = "clean", *, seed: int = 0,
           cache: Path | None = None, **options) -> nn.Module:
    """A plain network: the frozen features of `model` and a linear layer for the set's classes,
    fitted on its images (see `linear_probe`); .l2 is the strength that was chosen.

    head: of a Student, see `frozen_features`.  cache: file that keeps weight and bias.
    options: batch, amp, workers."""
    features = frozen_features(model, head)
    weight, bias, l2 = (from_first(lambda: _kept_probe(cache))
                        or fit_probe(features, images, seed=seed, **options))
    fc = nn.Linear(weight.shape[1], len(weight))
    fc.load_state_dict({"weight": weight, "bias": bias})
    if cache is not None and world()[0] == 0 and not cache.is_file():
        save_weights(cache, fc, {"l2": l2})
    net = freeze(nn.Sequential(features, Classifier(nn.Identity(), fc).to(device_of(features))))
    net.n_classes, net.l2 = len(weight), l2
    return net


# ---- which head answers on a set -----------------------------------------------------------------

@dataclass(frozen=True)
class Entry:
    """A network to score: label in the tables, its weights' hash, what its training cost (meta),
    and the set whose classes its outputs are ("" = none).  probe: only its features count."""
    label: str
    model: nn.Module
    weights: str
    meta: dict
    home: str = ""
    probe: bool = False


def family(name: str) -> str:
    """The set with the training images of this set's classes: imagenet for imagenet-r, shapes for
    shapes-c; a set of its own classes is its own."""
    base = base_name(name)[0].partition("@")[0]
    if base.startswith(("imagenet", "objectnet")):
        return "imagenet"
    return "shapes" if base.startswith("shapes") else base


@functools.cache
def _class_names(name: str, data: Data) -> tuple[str, ...]:
    """The names of a set's classes; none if it is not there to tell."""
    if name == "imagenet":
        return synsets()
    with contextlib.suppress(UserError):
        return tuple(open_set(name, data).classes)
    return ()


def head_for(entry: Entry, name: str, images: ImageSet, cfg: Config) -> str:
    """How a network answers on a set: "zero-shot" with a text head, made for the set's classes;
    "own" where its outputs are the set's classes, that is on sets of the family that it was
    trained on and on folders of the same class names; otherwise
    "linear probe (HEAD)", HEAD being eval.probe of a Student and clean of a plain network.

    Equal numbers of classes mean nothing: cifar10's are not fashion-mnist's.
    Raises: UserError where the number of outputs contradicts the network's own training set, and
    where a network that needs a probe cannot be cut."""
    if getattr(entry.model, "prompts", None) and not entry.probe:
        return "zero-shot"
    own = bool(entry.home) and not entry.probe and (
        family(name) == family(entry.home) or name.startswith("folder")
        and tuple(images.classes) == _class_names(entry.home, cfg.data))
    if own:
        n = len(synsets()) if images.project is not None else len(images.classes)
        if entry.model.n_classes != n:
            raise UserError(f"{entry.label} has {entry.model.n_classes} classes and {name} needs "
                            f"{n}: {entry.home} is not what it was when the network was trained")
        return "own"
    head = cfg.eval.probe if isinstance(entry.model, Student) else "clean"
    try:                                       # what cannot be cut says so before any work
        frozen_features(entry.model, head)
    except UserError as e:
        raise Absent(f"{name}: {entry.label} needs a linear probe there: {e}",
                     f"{entry.label} cannot be cut for a linear probe") from None
    return f"linear probe ({head})"


# ---- rows ----------------------------------------------------------------------------------------

def cells(name: str) -> list[tuple[str, int] | None]:
    """The cells of a set: [None], or the 15 corruptions x 5 severities of a -c set."""
    if not base_name(name)[1]:
        return [None]
    return [(c, s) for c in CORRUPTIONS_15 for s in range(1, 6)]


class Job(NamedTuple):
    """A set to score: its images, how each label answers, the images that teach the probes, and a
    hash of the prompts of zero-shot heads."""
    images: ImageSet
    heads: dict[str, str]
    train: ImageSet | None = None
    prompts: str = ""


ROW_KEY = ("label", "weights", "set", "corruption", "severity", "n", "limit", "transform", "head",
           "probe", "prompts", "made", "passes", "amp", "versions")


def row_key(row: dict) -> tuple:
    """What makes a result another result."""
    return tuple(row[k] for k in ROW_KEY)


def read_rows(run: Path) -> list[dict]:
    """The rows of a run's results.jsonl.  Raises: UserError on rows of another form."""
    rows = read_jsonl(run / "results.jsonl")
    if any(not {*ROW_KEY, "run", "seed", "trained_on"} <= set(r) for r in rows):
        raise UserError(f"{run / 'results.jsonl'} holds rows of another version of erpm.py: "
                        "move it away and run eval again")
    return [r | {"run": str(run)} for r in rows]           # a folder may be moved and renamed


def _done(out: Path) -> set[tuple]:
    """The keys of the rows that are there.  A last line that a crash left without its end is cut
    off: the next row would continue it."""
    file = out / "results.jsonl"
    text = file.read_text() if file.is_file() else ""
    if text and not text.endswith("\n"):
        write_atomically(file, lambda p: p.write_text(text[:text.rfind("\n") + 1]))
    return {row_key(r) for r in read_rows(out)}


def _identity(e: Entry, name: str, job: Job, images: ImageSet, corruption: tuple[str, int] | None,
              cfg: Config) -> dict:
    """The columns of a row that are known before it is computed, corruption and severity apart."""
    transform, probe, ev = images.transform, "", cfg.eval
    size = getattr(e.model, "size_px", 0)
    if corruption:
        transform += f", corrupted on the fly{', jpeg 85' * ev.jpeg}"
        transform += f", {frost_source(ev.frost_dir)} frost" * (corruption[0] == "frost")
    transform += f", network {size} px" * (size not in (0, images.view.size_px))
    head = job.heads[e.label]
    if head.startswith("linear probe"):
        probe = (f"{job.train.name}, {len(job.train):,} images, {job.train.transform}, seed "
                 f"{cfg.seed}")
    student = isinstance(e.model, Student) and not probe
    return {"label": e.label, "weights": e.weights, "set": name, "n": len(images),
            "limit": corruption and ev.n_cell or cfg.data.n_test, "transform": transform,
            "head": head, "probe": probe, "prompts": job.prompts * (head == "zero-shot"),
            "made": "regenerated" if corruption else images.made, "partial": images.partial,
            "passes": ev.passes if student else None, "versions": versions()["erpm"],
            "amp": str(amp_type(cfg.runtime.amp, pick_device()))}


def _provenance(entry: Entry, cfg: Config, images: ImageSet, seconds: float) -> dict:
    """The columns of a row that say where it comes from; images_per_s counts each image once,
    however many networks were scored on it together."""
    return {"rule": cfg.eval.rule, "seed": cfg.seed, "run": cfg.run, "trained_on": entry.home,
            "source": images.source, "seconds": seconds,
            "images_per_s": round(len(images) / max(seconds, 1e-3), 1),
            "device": pick_device().type, "processes": world()[1],
            "packages": versions(), "train": entry.meta.get("train", {})}


def _probe(e: Entry, row: dict, job: Job, cfg: Config, out: Path) -> nn.Module:
    """The network of a row whose head is a probe: from out/probes, or fitted now and kept there."""
    key = [row[k] for k in ("weights", "head", "probe", "amp", "versions")]
    cache = out / f"probes/{fold(*key):016x}.safetensors"
    kept = cache.is_file()
    head = row["head"].removeprefix("linear probe (").rstrip(")")
    net = probed(e.model, job.train, head, seed=cfg.seed, cache=cache, batch=cfg.eval.batch,
                 amp=cfg.runtime.amp, workers=cfg.data.workers)
    say(f"{row['set']}: linear probe of the {head} head's features of {e.label}, l2 = {net.l2:.3g},"
        f" from {len(job.train):,} training images of {job.train.name}{' (kept)' * kept}")
    return net


def _headed(e: Entry, row: dict, job: Job, cfg: Config, out: Path) -> nn.Module:
    """The network of a row with the head that the row names."""
    if row["probe"]:
        return _probe(e, row, job, cfg, out)
    return zero_shot(e.model, job.images, cfg.model.templates, out / "text")


def score(entries: Sequence[Entry], jobs: dict[str, Job], cfg: Config, out: Path) -> set[tuple]:
    """Appends to out/results.jsonl the missing rows: a row a cell, as soon as it is known.  A probe
    is fitted when the first row that needs it is missing.  Returns the keys of what was asked."""
    file, done, asked = out / "results.jsonl", from_first(lambda: _done(out)), set()
    todo = [(name, cell) for name in jobs for cell in cells(name)]
    n_of = {name: len(job.images) for name, job in jobs.items()}
    headed: dict[tuple, nn.Module] = {}
    with progress(sum(min(n_of[n], cfg.eval.n_cell or n_of[n]) if cell else n_of[n]
                      for n, cell in todo), "eval") as bar:
        for i, (name, cell) in enumerate(todo):
            images, corruption = open_cell(jobs[name].images, cell)
            images = images.subset(cfg.eval.n_cell) if corruption else images
            place = {"corruption": cell[0] if cell else "", "severity": cell[1] if cell else 0}
            rows = {e.label: _identity(e, name, jobs[name], images, corruption, cfg) | place
                    for e in entries if e.label in jobs[name].heads}
            asked |= set(map(row_key, rows.values()))
            pending = [e for e in entries
                       if e.label in rows and row_key(rows[e.label]) not in done]
            if not pending:
                bar.update(len(images))
                continue
            models = {}
            for e in pending:
                key = (e.label, rows[e.label]["probe"] or name)
                if key not in headed:
                    headed[key] = _headed(e, rows[e.label], jobs[name], cfg, out)
                models[e.label] = headed[key]
            with Signals() as signals:
                since = time.perf_counter()
                found = evaluate_all(models, images, corruption, batch=cfg.eval.batch,
                                     passes=cfg.eval.passes, jpeg=cfg.eval.jpeg,
                                     frost_dir=cfg.eval.frost_dir, amp=cfg.runtime.amp,
                                     workers=cfg.data.workers, bar=bar)
                seconds = round(time.perf_counter() - since, 3)
                if world()[0] == 0:
                    lines = [json.dumps(rows[e.label] | found[e.label] | _provenance(
                        e, cfg, images, seconds)) + "\n" for e in pending]
                    with open(file, "a") as f:
                        f.write("".join(lines))
                if _agreed(bool(signals.hit), pick_device()):
                    raise Interrupted("eval stopped after a whole cell; the same command goes on "
                                      "from here")
            if bar.disable and (i % 15 == 14 or i + 1 == len(todo)):
                say(f"eval: {i + 1} of {len(todo)} cells ({name})")
    return asked


# ==== 10. REPORT ====
# In: rows of results.jsonl.  Out: Markdown and figures.  Always: a pure function of the rows (the
# picture grid alone looks at images); what is missing is called missing, never a smaller mean.

LABELS = {"erpm": "ERPM", "apt": "APT", "lp": "LP"}
PAPER_SHIFTS = ("imagenet-c", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch",
                "objectnet", "objectnet-c")                              # [A] Tables 1 to 3
PAPER_TRANSFER = ("tiny-imagenet", "flowers102", "places205", "inaturalist2021", "sun397")
DAD_SETS = ("imagenet", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-c")
# sets of some of ImageNet's classes, and the clean images of the same classes
SAME_CLASSES = {"imagenet-a": "imagenet@a", "imagenet-r": "imagenet@r",
                "objectnet": "imagenet@objectnet"}
# AlexNet's errors in percent, means of 5 severities, and the clean one (Hendrycks & Dietterich
# 2019)
ALEXNET = dict(zip(CORRUPTIONS_15, (
    88.6428, 89.4468, 92.2640, 81.9880, 82.6268, 78.5948, 79.8360, 86.6816, 82.6572, 81.9324,
    56.4592, 85.3204, 64.6056, 71.7840, 60.6500)))
ALEXNET_CLEAN = 43.478
# Networks trained on ImageNet alone in the plain way, top-1 in percent at 224 px: imagenet, -v2,
# imagenet@a, -a, imagenet@r, -r, -sketch.  From timm's published results (huggingface/
# pytorch-image-models, results/results-*.csv, commit aa4b585).  ResNet-50 is not among them:
# ImageNet-A holds what it gets wrong.
REFERENCE = {
    "vgg11.tv_in1k": (69.050, 55.850, 86.570, 1.613, 87.340, 26.620, 15.715),
    "vgg16.tv_in1k": (71.594, 58.640, 88.540, 2.560, 89.400, 27.960, 17.534),
    "vgg19_bn.tv_in1k": (74.230, 61.880, 90.100, 2.853, 90.980, 33.310, 21.637),
    "resnet18.tv_in1k": (69.752, 57.350, 87.380, 1.120, 88.200, 33.023, 20.238),
    "resnet34.tv_in1k": (73.298, 61.210, 89.930, 1.840, 90.290, 36.140, 23.494),
    "resnet101.tv_in1k": (77.404, 65.940, 92.810, 4.560, 92.890, 39.297, 26.974),
    "resnet152.tv_in1k": (78.330, 67.040, 93.330, 6.053, 93.270, 41.340, 28.550),
    "densenet121.tv_in1k": (74.750, 62.760, 90.900, 2.467, 91.440, 36.767, 23.836),
    "densenet161.tv_in1k": (77.384, 65.720, 92.550, 4.627, 92.950, 39.630, 28.116),
    "resnext50_32x4d.tv_in1k": (77.632, 65.950, 92.750, 4.680, 92.900, 37.787, 25.481),
    "resnext101_32x8d.tv_in1k": (79.308, 67.750, 93.810, 10.133, 93.780, 42.600, 29.445),
    "regnety_008.pycls_in1k": (76.334, 63.800, 91.730, 3.747, 91.890, 34.883, 22.131),
    "regnety_040.pycls_in1k": (79.246, 67.650, 93.880, 9.027, 93.610, 38.837, 25.923),
    "regnety_320.pycls_in1k": (80.796, 69.950, 94.580, 15.453, 94.500, 40.840, 28.067)}
# shift -> (the clean set of the same classes, columns of the two in REFERENCE)
REFERENCE_SETS = {"imagenet-v2": ("imagenet", 0, 1), "imagenet-a": ("imagenet@a", 2, 3),
                  "imagenet-r": ("imagenet@r", 4, 5), "imagenet-sketch": ("imagenet", 0, 6)}
# Published figures in percent: top-1, on imagenet-c the mCE.  The key is the label in the rows.
KNOWN = {
    "timm:resnet50.tv_in1k": {
        "imagenet": 76.13, "imagenet-a": 0.00, "imagenet-r": 36.17, "imagenet-sketch": 24.09,
        "imagenet-v2": 63.21, "objectnet": 35.75, "imagenet-c": 76.7},
    "timm:resnet101.tv_in1k": {
        "imagenet": 77.37, "imagenet-a": 4.72, "imagenet-r": 39.31, "imagenet-sketch": 26.97,
        "imagenet-v2": 65.45, "objectnet": 38.38},
    "AugMix ResNet-50": {"imagenet-c": 65.3},
    "DeepAugment+AugMix ResNet-50": {
        "imagenet": 75.82, "imagenet-a": 3.88, "imagenet-r": 46.77, "imagenet-sketch": 32.62,
        "imagenet-v2": 63.54, "objectnet": 35.15, "imagenet-c": 53.6},
    "open_clip:ViT-B-32-quickgelu/openai": {
        "imagenet": 63.30, "imagenet-a": 31.39, "imagenet-r": 69.26, "imagenet-sketch": 42.37,
        "imagenet-v2": 55.77, "objectnet": 43.96}}
KNOWN_IMAGES = {"imagenet": 50000, "imagenet-a": 7500, "imagenet-r": 30000,
                "imagenet-sketch": 50889, "imagenet-v2": 10000, "objectnet": 18574,
                "imagenet-c": 50000}
PARTIAL = "\\* of a part of the set's images (data.allow_partial)"


# ---- rows and measures ---------------------------------------------------------------------------

def _transform(row: dict) -> str:
    """The transform without the source of frost's textures, which is frost's alone."""
    return re.sub(", [a-z]+ frost", "", row["transform"])


def latest(rows: list[dict]) -> list[dict]:
    """One row a cell.  Kept are, in this order: of each (run, label, head) the newest weights and
    code; of each set the newest way it was made (from disk or on the fly: never both in a
    column); of each (label, head, set) the most images, then the newest transform.  Raises:
    UserError on two runs that are no two seeds."""
    probed = lambda r: r["set"] if r["head"] != "own" else ""   # such a head is made for each set
    by_set, size = lambda r: (r["label"], r["head"], r["set"]), lambda r: r["limit"] or math.inf
    for group, same in (
            (lambda r: (r["run"], r["seed"], r["label"], r["head"], probed(r)),
             lambda r: (r["weights"], r["versions"], r["prompts"])),
            (lambda r: r["set"], lambda r: r["made"]),
            (by_set, size),
            (by_set, lambda r: (r["passes"], r["amp"], _transform(r))),
            (lambda r: (r["label"], r["head"], r["set"], r["corruption"]),
             lambda r: r["transform"])):
        newest = {group(r): same(r) for r in (sorted(rows, key=size) if same is size else rows)}
        rows = [r for r in rows if newest[group(r)] == same(r)]
    runs: dict[tuple, str] = {}
    for r in rows:
        other = runs.setdefault((r["label"], r["seed"]), r["run"])
        if other != r["run"]:
            raise UserError(f"{other} and {r['run']} both hold {r['label']} of seed {r['seed']}: a "
                            "report averages over seeds; give it runs that differ in nothing else")
    return list({(r["run"], r["seed"], r["label"], r["head"], r["set"], r["corruption"],
                  r["severity"]): r for r in rows}.values())


def labelled(rows: list[dict]) -> list[dict]:
    """The rows with the head in the label where it is not the network's own: "x, zero-shot"."""
    return [r if r["head"] == "own" else r | {"label": f"{r['label']}, {r['head']}"} for r in rows]


def metric(row: dict, name: str, rule: str | None = None):
    """A figure of a row; of a Student under a rule (by default the row's own)."""
    return (choose(row["rules"], rule or row["rule"], "rule in the results") if "rules" in row
            else row)[name]


def accuracy(row: dict, rule: str | None = None) -> float:
    """Top-1 accuracy of a row under a rule (plain networks have none)."""
    return metric(row, "correct", rule) / row["n"]


def in_distribution(row: dict) -> bool:
    """Whether the images are clean ones of the training set's kind."""
    return row["set"].partition("@")[0] == row["trained_on"]


def f_correct(row: dict, rule: str) -> float:
    """Share of images with the right head: clean in distribution, robust under shift ([A] T6)."""
    return row["rules"][rule]["heads"][0 if in_distribution(row) else 2] / row["n"]


def averaged(pick: Callable[[dict], float]) -> Callable[[list[dict]], float]:
    """The measure "mean over the sets of the mean of pick over a set's cells"."""
    def measure(rows: list[dict]) -> float:
        sets: dict[str, list[float]] = {}
        for r in rows:
            sets.setdefault(r["set"], []).append(pick(r))
        return float(np.mean([np.mean(v) for v in sets.values()]))
    return measure


TOP1 = averaged(accuracy)
MEASURES = {"top-1": (TOP1, 100),                         # name: (measure, scale for the tables)
            "top-5": (averaged(lambda r: metric(r, "correct5") / r["n"]), 100),
            "NLL": (averaged(lambda r: metric(r, "nll")), 1),
            "ECE": (averaged(lambda r: metric(r, "ece")), 100)}


def corruption_errors(rows: list[dict]) -> dict[str, float]:
    """{corruption: error in percent, mean over its severities}."""
    found: dict[str, list[float]] = {}
    for r in rows:
        if r["corruption"]:
            found.setdefault(r["corruption"], []).append(100 * (1 - accuracy(r)))
    return {c: float(np.mean(v)) for c, v in found.items()}


def mce(rows: list[dict]) -> float:
    """Mean over the corruptions of the error as a share of AlexNet's, from the cells of imagenet-c.

    Paper: Hendrycks & Dietterich 2019; 1 = as AlexNet, less is better."""
    return float(np.mean([e / ALEXNET[c] for c, e in corruption_errors(rows).items()]))


def relative_mce(rows: list[dict]) -> float:
    """mCE of what an error adds to the clean one, from the cells of imagenet-c and imagenet."""
    clean = 100 * (1 - TOP1([r for r in rows if not r["corruption"]]))
    return float(np.mean([(e - clean) / (ALEXNET[c] - ALEXNET_CLEAN)
                          for c, e in corruption_errors(rows).items()]))


def effective_robustness(clean: float, shift: float,
                         reference: Sequence[tuple[float, float]]) -> float:
    """Accuracy under a shift beyond what standard networks of the same clean accuracy have.

    reference: (clean, shift) accuracies of such networks; the expected value is a line through
    their logits.  Units: fractions.  Paper: Taori et al. 2020, rho = shift - beta(clean)."""
    def logit(p):
        p = np.clip(p, 1e-6, 1 - 1e-6)
        return np.log(p / (1 - p))
    x, y = logit(np.array(reference)).T
    slope, offset = np.polyfit(x, y, 1)
    return float(shift - 1 / (1 + np.exp(-(slope * logit(clean) + offset))))


def rho(shift: str) -> Callable[[list[dict]], float]:
    """The measure effective_robustness of the cells of a shift and its clean set."""
    _, a, b = REFERENCE_SETS[shift]
    reference = [(v[a] / 100, v[b] / 100) for v in REFERENCE.values()]
    return lambda rows: effective_robustness(TOP1([r for r in rows if r["set"] != shift]),
                                             TOP1([r for r in rows if r["set"] == shift]),
                                             reference)


def cells_of(rows: list[dict], label: str, names: str | Sequence[str], **where) -> list[dict]:
    """The rows of a model on a set or on several; where: corruption=..., severity=... narrow."""
    names = (names,) if isinstance(names, str) else names
    return [r for r in rows if r["label"] == label and r["set"] in names
            and all(r[k] == v for k, v in where.items())]


def measured(rows: list[dict], label: str, names: str | Sequence[str],
             measure: Callable[[list[dict]], float] = TOP1, **where) -> list[float]:
    """The measure of a model's cells, a value a seed; [] when a cell or a seed is missing."""
    seeds: dict[tuple, list[dict]] = {(r["run"], r["seed"]): [] for r in rows
                                      if r["label"] == label}
    for r in cells_of(rows, label, names, **where):
        seeds[r["run"], r["seed"]].append(r)
    n = len([c for name in ((names,) if isinstance(names, str) else names) for c in cells(name)
             if c is None or all(dict(corruption=c[0], severity=c[1])[k] == v
                                 for k, v in where.items())])
    full = [v for v in seeds.values() if len(v) == n > 0]
    return [measure(v) for v in full] if len(full) == len(seeds) else []


def column(rows: list[dict], label: str, names: str | Sequence[str],
           measure: Callable[[list[dict]], float] = TOP1, *, scale: float = 100.0,
           form: str = ".2f", **where) -> str:
    """"mean ± standard deviation" over the seeds of a measure, "missing" when a cell is missing;
    with * when a set was scored in part."""
    values = scale * np.array(measured(rows, label, names, measure, **where))
    if not len(values):
        return "missing"
    spread = f" ± {np.std(values, ddof=1):{form.lstrip('+')}}" if len(values) > 1 else ""
    star = "*" * any(r["partial"] for r in cells_of(rows, label, names, **where))
    return f"{np.mean(values):{form}}{spread}{star}"


def training_cost(rows: list[dict], label: str, per_image: bool = True) -> float | None:
    """Seconds of training, in all or a training image, mean over the runs; None = not known."""
    cost = {r["run"]: r["train"]["seconds"] / (r["train"]["images"] if per_image else 1)
            for r in rows if r["label"] == label and r["train"].get("images")}
    return float(np.mean(list(cost.values()))) if cost else None


class Groups(NamedTuple):
    """The sets of a report: the one trained on, its shifts in the papers' order, the others."""
    home: str
    shifts: tuple[str, ...]
    transfer: tuple[str, ...]


def groups(rows: list[dict]) -> Groups:
    """The sets that are in the rows.  The clean images of a shift's classes (imagenet@a) are in no
    group; after tuning on a part of the classes these are home, and the unseen ones transfer."""
    sets = list(dict.fromkeys(
        r["set"] for r in rows if r["set"].partition("@")[2] not in PARTS))
    is_imagenet = any(re.match("imagenet[-@]|imagenet$|objectnet", s) for s in sets)
    home = next((r["trained_on"] for r in rows if r["trained_on"]),
                "imagenet" if is_imagenet else "")
    whole, home = home, f"{home}@seen" if f"{home}@seen" in sets else home
    shifts = [s for s in PAPER_SHIFTS if s in sets] + [
        s for s in sets if s not in (home, *PAPER_SHIFTS)
        and class_side(s)[1] == class_side(home)[1]
        and (s.startswith(f"{whole}-") or base_name(s)[0] == home)]
    transfer = [s for s in PAPER_TRANSFER if s in sets]
    return Groups(home, tuple(shifts), (*transfer, *(s for s in sets if s not in (
        home, *shifts, *transfer))))


# ---- Markdown ------------------------------------------------------------------------------------

def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns aligned."""
    rows = [list(map(str, head)), *[list(map(str, r)) for r in body]]
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    line = lambda r: "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths)) + " |"   # noqa: E731
    return "\n".join([line(rows[0]), "|" + "|".join("-" * (w + 2) for w in widths) + "|",
                      *map(line, rows[1:])])


def part(title: str, head: Sequence[str], body: Sequence[Sequence[str]], note: str = "") -> str:
    """A titled table with a line above it, and below it what a * means where there is one."""
    starred = any(str(c).endswith("*") for line in body for c in line)
    return "\n\n".join([f"## {title}", *filter(None, [note]), table(head, body),
                        *[PARTIAL] * starred])


def heading(rows: list[dict], name: str) -> str:
    """A set's name in the head of a column, with "(regenerated)" where it was made on the fly."""
    made = {r["made"] for r in rows if r["set"] == name}
    return f"{name} (regenerated)" if "regenerated" in made else name


def models_on(rows: list[dict], sets: Sequence[str]) -> list[str]:
    """The models that were scored on some of the sets, in the order of the rows."""
    return list(dict.fromkeys(r["label"] for r in rows if r["set"] in sets))


def students_of(rows: list[dict]) -> list[str]:
    """The models with three heads."""
    return list(dict.fromkeys(r["label"] for r in rows if "rules" in r))


def set_columns(rows: list[dict], sets: Sequence[str]) -> list[tuple[str, Callable[[str], str]]]:
    """(title, label -> cell) of the top-1 accuracy on each set."""
    return [(heading(rows, s), lambda x, s=s: column(rows, x, s)) for s in sets]


def by_model(title: str, labels: Sequence[str], columns: Sequence[tuple[str, Callable]],
             note: str = "") -> str:
    """A part with a line a model."""
    return part(title, ["model", *[c for c, _ in columns]],
                [[x, *[cell(x) for _, cell in columns]] for x in labels], note)


def mean_column(rows: list[dict], shifts: Sequence[str]) -> tuple[str, Callable[[str], str]]:
    """The column of the mean over the shifts, which says how many there are."""
    return (f"mean of {len(shifts)} shift{'s' * (len(shifts) > 1)}",
            lambda x: column(rows, x, shifts))


def mce_columns(rows: list[dict], relative: bool = True) -> list[tuple[str, Callable[[str], str]]]:
    """The columns mCE and relative mCE of imagenet-c."""
    return [("mCE", lambda x: column(rows, x, "imagenet-c", mce))] + [
        ("relative mCE", lambda x: column(rows, x, ("imagenet-c", "imagenet"), relative_mce))
    ] * relative


def models_part(rows: list[dict], g: Groups) -> list[str]:
    """The small first table: every model on its own set and the shifts, and its training cost."""
    unseen = [s for s in g.transfer if class_side(s)[1]]
    sets = [s for s in (g.home, *g.shifts, *unseen) if models_on(rows, [s])] or g.transfer
    sets = sets or list(dict.fromkeys(r["set"] for r in rows))

    def cost(label: str) -> str:
        seconds = training_cost(rows, label)
        return f"{1000 * seconds:.3g}" if seconds is not None else "-"
    return [by_model("Models", models_on(rows, sets),
                     [*set_columns(rows, sets), ("ms / training image", cost)])]


def shift_parts(rows: list[dict], g: Groups) -> list[str]:
    """[A] Tables 1 to 3, left half: clean, the mean over the shifts, every shift, mCE."""
    if not g.shifts:
        return []
    sets = list(dict.fromkeys((*(PAPER_SHIFTS if g.home == "imagenet" else ()), *g.shifts)))
    absent = [s for s in sets if s not in g.shifts]
    note = (f"The mean is that of {', '.join(g.shifts)}; no result at all for "
            f"{', '.join(absent)}.") if absent else ""
    return [by_model("Distribution shifts", models_on(rows, (g.home, *g.shifts)), [
        *set_columns(rows, [g.home]), mean_column(rows, g.shifts), *set_columns(rows, sets),
        *(mce_columns(rows) if "imagenet-c" in sets else ())], note)]


def transfer_parts(rows: list[dict], g: Groups) -> list[str]:
    """[A] Tables 1 to 3, right half: other data sets; the head is named behind the model."""
    if not g.transfer:
        return []
    paper = PAPER_TRANSFER if g.home == "imagenet" else ()
    sets = list(dict.fromkeys((*paper, *g.transfer)))
    return [by_model("Transfer", models_on(rows, sets), set_columns(rows, sets))]


def dad_parts(rows: list[dict], g: Groups) -> list[str]:
    """[B]'s table of the plain networks: clean, the shifts, and mCE for -c."""
    students = students_of(rows)
    labels = [x for x in models_on(rows, DAD_SETS) if x not in students]
    if not labels or g.home != "imagenet":
        return []
    return [by_model("Plain networks ([B])", labels, [
        *set_columns(rows, DAD_SETS), *mce_columns(rows, False)])]


def same_class_parts(rows: list[dict]) -> list[str]:
    """Sets of some of ImageNet's classes beside the clean images of the same classes."""
    pairs = [(a, b) for a, b in SAME_CLASSES.items() if models_on(rows, (a, b))]
    columns = [(title, cell) for shift, clean in pairs for title, cell in (
        *set_columns(rows, [clean, shift]),
        ("drop", lambda x, pair=(shift, clean): column(rows, x, pair, lambda found: TOP1(
            [r for r in found if "@" in r["set"]]) - TOP1(
            [r for r in found if "@" not in r["set"]]))))]
    sets = [s for pair in pairs for s in pair]
    return [by_model("The same classes, clean and shifted", models_on(rows, sets), columns,
                     "imagenet@x: the clean images of the classes of x, scored over those classes "
                     "alone.")] if pairs else []


def effective_parts(rows: list[dict]) -> list[str]:
    """Effective robustness on the sets for which REFERENCE has figures."""
    sets = [s for s in REFERENCE_SETS if models_on(rows, [s])]
    columns = [(s, lambda x, s=s: column(rows, x, (s, REFERENCE_SETS[s][0]), rho(s), form="+.2f"))
               for s in sets]
    note = ("Points above the accuracy that standard networks of the same clean accuracy have "
            f"(Taori et al. 2020; a line through the logits of {len(REFERENCE)} networks). For -a "
            "and -r the clean accuracy is that on their classes, imagenet@a and imagenet@r.")
    return [by_model("Effective robustness", models_on(rows, sets), columns, note)] if sets else []


def corruption_parts(rows: list[dict], name: str) -> list[str]:
    """A -c set by corruption and by severity, and the error relative to AlexNet's."""
    labels, title = models_on(rows, [name]), heading(rows, name)
    clean = base_name(name)[0]
    parts = [part(f"{title} by corruption (mean of 5 severities)", ["corruption", *labels], [
        [c, *[column(rows, x, name, corruption=c) for x in labels]] for c in CORRUPTIONS_15]),
        part(f"{title} by severity (mean of 15 corruptions)", ["severity", *labels], [
            ["0 (clean)", *[column(rows, x, clean) for x in labels]],
            *[[k, *[column(rows, x, name, severity=k) for x in labels]] for k in range(1, 6)]])]
    if name == "imagenet-c":
        parts.append(part(f"{title}: error relative to AlexNet's", ["corruption", *labels], [
            *[[c, *[column(rows, x, name, mce, corruption=c) for x in labels]]
              for c in CORRUPTIONS_15],
            *[[head, *map(cell, labels)] for head, cell in mce_columns(rows)]],
            "In percent: 100 = as many errors as AlexNet."))
    return parts


def rule_lines(rows: list[dict], label: str, accuracies: Sequence, routings: Sequence) -> list:
    """A line a selection rule and one for perfect routing: the accuracy over each group of sets of
    `accuracies`, and F_correct over each of `routings`."""
    found = [r["rules"] for r in rows if r["label"] == label]
    lines = []
    for rule in [k for k in found[0] if all(k in rules for rules in found)]:
        name = {"oracle": "either head right"}.get(
            rule, f"always {rule}" if rule in HEADS else rule)
        scored = [column(rows, label, s, averaged(lambda r: accuracy(r, rule)))
                  for s in accuracies]
        routed = ["-" if rule in (*HEADS, "oracle") else
                  column(rows, label, s, averaged(lambda r: f_correct(r, rule))) for s in routings]
        lines.append([name, *scored, *routed])
    perfect = averaged(lambda r: accuracy(r, "clean" if in_distribution(r) else "robust"))
    return [*lines, ["perfect routing", *[column(rows, label, s, perfect) for s in accuracies],
                     *["100.00"] * len(routings)]]


def rule_parts(rows: list[dict], label: str, g: Groups) -> list[str]:
    """[A] Table 7: which rule picks the head; below it every shift alone."""
    home = [g.home] * bool(cells_of(rows, label, g.home))
    shifts = [s for s in g.shifts if cells_of(rows, label, s)]
    sets = [*home, *[tuple(shifts)] * bool(shifts)]
    if not sets:
        return []
    mean = mean_column(rows, shifts)[0] if len(shifts) > 1 else "".join(shifts)
    heads = [*home, *[mean] * bool(shifts)]
    parts = [part(f"{label}: which rule picks the head",
                  ["rule", *heads, *[f"F {s}" for s in heads]],
                  rule_lines(rows, label, sets, sets),
                  "F = share of images sent to the right head: clean in distribution, robust under "
                  "shift.")]
    if len(shifts) > 1:
        parts.append(part(f"{label}: every rule on every shift",
                          ["rule", *[heading(rows, s) for s in shifts]],
                          rule_lines(rows, label, shifts, ())))
    return parts


def head_parts(rows: list[dict], label: str, g: Groups) -> list[str]:
    """Share of each head, F_correct, mean sigma and mean KL, by set and severity."""
    own = [r for r in rows if r["label"] == label]
    rule = own[0]["rule"]
    split = lambda name, i: averaged(lambda r: r[name][i])                             # noqa: E731
    share = lambda i: averaged(lambda r: metric(r, "heads")[i] / r["n"])               # noqa: E731
    body = []
    for name in dict.fromkeys(r["set"] for r in own):
        for k in (range(1, 6) if len(cells(name)) > 1 else ("-",)):
            at = {} if k == "-" else {"severity": k}
            body.append([heading(rows, name), k,
                         *[column(own, label, name, share(i), **at) for i in range(3)],
                         "-" if name in g.transfer else column(
                             own, label, name, averaged(lambda r: f_correct(r, rule)), **at),
                         *[column(own, label, name, split(v, i), scale=1, form=".4f", **at)
                           for v in ("sigma", "kl") for i in (0, 1)]])
    return [part(f"{label}: the heads ({rule})", [
        "set", "severity", *HEADS, "F", "sigma clean", "sigma robust", "KL clean", "KL robust"],
        body, "Share of the images that each head answered; F as above; sigma of the clean and of "
              "the robust head and their KL divergence to the combined one, means over the "
              "images.")]


def every_set_part(rows: list[dict]) -> str:
    """Top-1, top-5, NLL, ECE and speed of every model on every set."""
    rate = averaged(lambda r: r["images_per_s"])
    return part("Every model on every set", ["set", "model", *MEASURES, "images/s"], [
        [heading(rows, s), x,
         *[column(rows, x, s, m, scale=scale, form=".3f" if scale == 1 else ".2f")
           for m, scale in MEASURES.values()], column(rows, x, s, rate, scale=1, form=".0f")]
        for s in dict.fromkeys(r["set"] for r in rows) for x in models_on(rows, [s])],
        "NLL in nats; ECE in percent, 15 bins; means over the cells of a -c set.")


def sets_part(rows: list[dict]) -> str:
    """What each set is: images, cells, transform, where from; a line for each way it was scored."""
    lines = {(r["set"], f"{r['n']}{'*' * r['partial']}", len(cells(r["set"])), _transform(r),
              r["made"] or "-"): None for r in rows}
    return part("Sets", ["set", "images a cell", "cells", "transform", "made"], list(lines))


APPENDIX = "Every cell: "


def cell_parts(rows: list[dict], name: str) -> list[str]:
    """A table a model: the 15 corruptions x 5 severities of a -c set."""
    parts = []
    for x in models_on(rows, [name]):
        own = [r for r in rows if r["label"] == x]
        parts.append(part(f"{APPENDIX}{heading(rows, name)}, {x}", [
            "corruption", *map(str, range(1, 6))], [
            [c, *[column(own, x, name, corruption=c, severity=k) for k in range(1, 6)]]
            for c in CORRUPTIONS_15]))
    return parts


def report_text(rows: list[dict]) -> str:
    """The whole report in Markdown, a pure function of the rows."""
    rows = labelled(latest(rows))
    g, seeds = groups(rows), len({r["seed"] for r in rows})
    wide = [s for s in dict.fromkeys(r["set"] for r in rows) if len(cells(s)) > 1]
    intro = ("Top-1 accuracy in percent; mean over the cells of a -c set; "
             + (f"± = standard deviation over {seeds} seeds." if seeds > 1 else "one seed."))
    parts = [f"# {g.home or ', '.join(g.transfer)}", intro,
             *models_part(rows, g), *shift_parts(rows, g), *transfer_parts(rows, g),
             *dad_parts(rows, g), *same_class_parts(rows), *effective_parts(rows)]
    for x in students_of(rows):
        parts += [*rule_parts(rows, x, g), *head_parts(rows, x, g)]
    for name in wide:
        parts += corruption_parts(rows, name)
    parts += [every_set_part(rows), sets_part(rows)]
    for name in wide:
        parts += cell_parts(rows, name)
    return "\n\n".join(parts) + "\n"


def check_known(rows: list[dict]) -> str:
    """Markdown table of our figures beside the published ones of KNOWN, with a verdict a line.

    "agrees": within 0.5 points on sets of at most 10,000 images and 0.3 on larger ones, which is
    what another version of the image library moves (timm's own figures of one ResNet-101 on V2 lie
    within 0.26); for the mCE 0.3 from disk and 1.0 regenerated.  Otherwise "differs"; "missing"
    where there is no figure of the whole set."""
    rows = [r for r in latest(rows) if not r["head"].startswith("linear probe")]
    body = []
    for label in [x for x in dict.fromkeys(r["label"] for r in rows) if x in KNOWN]:
        for name, published in KNOWN[label].items():
            own, is_c = cells_of(rows, label, name), name == "imagenet-c"
            title = f"{heading(own, name)}{', mCE' * is_c}"
            values = measured(rows, label, name, mce if is_c else TOP1)
            if not values or any(r["n"] != KNOWN_IMAGES[name] for r in own):
                seen = f" ({own[0]['n']:,} of {KNOWN_IMAGES[name]:,} images)" if values else ""
                body.append([label, title, f"{published:.2f}", "-", "-", f"missing{seen}"])
                continue
            gap = round(100 * float(np.mean(values)) - published, 4)
            room = (1.0 if own[0]["made"] == "regenerated" else 0.3) if is_c else \
                0.5 if KNOWN_IMAGES[name] <= 10000 else 0.3
            body.append([label, title, f"{published:.2f}", f"{published + gap:.2f}", f"{gap:+.2f}",
                         f"agrees (within {room})" if abs(gap) <= room else
                         f"differs (by more than {room})"])
    if not body:
        return f"no published figures for these networks (there are for {', '.join(KNOWN)})"
    return table(["network", "set", "published", "measured", "difference", "verdict"], body)


# ---- figures -------------------------------------------------------------------------------------

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000")   # Okabe & Ito
STUDENT_COLOUR = "#D55E00"
HEAD_COLOURS = dict(zip(HEADS, ("#56B4E9", "#BBBBBB", "#D55E00")))
MARKERS = "osD^vPX"


def line_styles(rows: list[dict], labels: Sequence[str]) -> dict[str, dict]:
    """{model: colour, marker and line}: the same in every figure, Students stand out."""
    students, plain = students_of(rows), 0
    styles = {}
    for x in labels:
        lead = x in students and students.index(x) == 0
        plain += not lead
        colour = STUDENT_COLOUR if lead else COLOURS[(plain - 1) % len(COLOURS)]
        marker = "o" if lead else MARKERS[plain % len(MARKERS)]
        styles[x] = {"color": colour, "marker": marker, "linewidth": 2.4 if lead else 1.5,
                     "linestyle": "-" if plain <= len(COLOURS) or lead else "--",
                     "zorder": 3 if lead else 2}
    return styles


def panels(n_rows: int, n_columns: int, width: float = 4.2, height: float = 3.4):
    """(figure, axes (n_rows, n_columns)) without frames; drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    fig = Figure(figsize=(0.8 + width * n_columns, 0.7 + height * n_rows), dpi=150,
                 layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(n_rows, n_columns, squeeze=False, sharey=True)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
        ax.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    return fig, axes


def severity_figure(rows: list[dict], wide: Sequence[str]):
    """Accuracy against severity ([A] Fig. 3), a panel a -c set, a line a model; band = spread."""
    fig, axes = panels(1, len(wide))
    labels = models_on(rows, wide)
    styles = line_styles(rows, labels)
    for ax, name in zip(axes[0], wide):
        for x in labels:
            own = [r for r in rows if r["label"] == x]
            values = [measured(own, x, base_name(name)[0])] + [
                measured(own, x, name, severity=k) for k in range(1, 6)]
            mean = np.array([100 * np.mean(v) if v else np.nan for v in values])
            spread = np.array([100 * np.std(v, ddof=1) if len(v) > 1 else 0 for v in values])
            ax.plot(range(6), mean, label=x, markersize=5, **styles[x])
            if spread.any():
                ax.fill_between(range(6), mean - spread, mean + spread, linewidth=0, alpha=0.18,
                                color=styles[x]["color"])
        ax.set_title(heading(rows, name), fontsize=11)
        ax.set_xlabel("severity (0 = clean)")
        ax.set_xticks(range(6))
    axes[0, 0].set_ylabel("top-1 accuracy, %")
    handles = {t: h for ax in axes[0] for h, t in zip(*ax.get_legend_handles_labels())}
    fig.legend(handles.values(), handles, loc="outside lower center", frameon=False,
               ncols=min(len(handles), 3 * len(wide)))
    return fig


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, gain) points that no other beats: none costs less and gains as much."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def place_labels(ax, points: Sequence[tuple[float, float]], names: Sequence[str],
                 line: Sequence[tuple[float, float]]) -> None:
    """Writes each name beside its point, where it covers no point, no other name and no piece of
    the line, whose pieces are level or upright."""
    from matplotlib.transforms import Bbox
    ax.figure.draw_without_rendering()                            # settles the layout
    pixels = ax.transData.transform(line)
    taken = [Bbox([np.minimum(a, b) - 2, np.maximum(a, b) + 2]) for a, b in
             zip(pixels, pixels[1:])]
    taken += [Bbox([at - 12, at + 12]) for at in ax.transData.transform(points)]
    x0, y0, x1, y1 = ax.get_window_extent().extents
    spots = [(-8, 8, "right"), (9, -1, "left"), (0, 13, "center"), (8, 10, "left"),
             (8, -10, "left"), (-8, -10, "right"), (-9, -1, "right"), (0, -14, "center")]
    for at, name in zip(points, names):
        texts = [ax.annotate(name, at, (dx, dy), textcoords="offset points", ha=side, va="center",
                             fontsize=9.5) for dx, dy, side in spots]
        boxes = [text.get_window_extent() for text in texts]
        free = [not any(box.overlaps(t) for t in taken) and box.x0 >= x0 and box.x1 <= x1
                and box.y0 >= y0 and box.y1 <= y1 for box in boxes]
        best = free.index(True) if any(free) else 0
        taken.append(boxes[best])
        for text in texts[:best] + texts[best + 1:]:
            text.remove()


def pareto_figure(rows: list[dict], shifts: Sequence[str]):
    """Mean accuracy over the shifts against training time ([A] Fig. 1), with the Pareto front;
    None without a model whose training time is known."""
    labels = models_on(rows, shifts)
    values = {x: 100 * np.array(v) for x in labels if (v := measured(rows, x, shifts))}
    seconds = {x: s for x in values if (s := training_cost(rows, x, per_image=False))}
    if not seconds:
        return None
    unit, each = next((u, e) for u, e, most in (("s", 1, 600), ("min", 60, 7200),
                                                ("h", 3600, math.inf))
                      if max(seconds.values()) < most)
    fig, axes = panels(1, 1, 5.6, 3.9)
    ax, styles = axes[0, 0], line_styles(rows, labels)
    points = {x: (s / each, float(values[x].mean())) for x, s in seconds.items()}
    for x, (cost, gain) in points.items():
        spread = values[x].std(ddof=1) if len(values[x]) > 1 else None
        ax.errorbar(cost, gain, spread, color=styles[x]["color"], marker=styles[x]["marker"],
                    markersize=8, linestyle="", elinewidth=1.2, capsize=3, zorder=3)
    for x in [x for x in values if x not in points]:
        ax.axhline(values[x].mean(), color=styles[x]["color"], linestyle=":", linewidth=1.6,
                   label=f"{x} (not trained here)")
    ax.margins(0.16, 0.14)
    if max(seconds.values()) > 15 * min(seconds.values()):
        from matplotlib.ticker import LogLocator
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
    front, right = pareto_front(list(points.values())), ax.get_xlim()[1]
    steps = [corner for (x, y), (after, _) in zip(front, [*front[1:], (right, 0)])
             for corner in ((x, y), (after, y))]
    ax.plot(*zip(*steps), color="#999999", linewidth=1.2, zorder=1, label="Pareto front")
    ax.set_xlim(right=right)
    ax.set_xlabel(f"training time, {unit} (the model's own stage)")
    ax.set_ylabel(f"top-1 accuracy, %, {mean_column(rows, shifts)[0]}")
    fig.legend(loc="outside lower center", frameon=False, ncols=2)
    place_labels(ax, list(points.values()), list(points), steps)
    return fig


def heads_figure(rows: list[dict], wide: Sequence[str]):
    """Share of each head by severity, a row a Student, a column a -c set; None without any."""
    students = [x for x in students_of(rows) if cells_of(rows, x, wide)]
    if not students:
        return None
    fig, axes = panels(len(students), len(wide), 3.6, 2.8)
    for ax, (x, name) in zip(axes.flat, [(x, name) for x in students for name in wide]):
        own = [r for r in rows if r["label"] == x]
        bottom = np.zeros(6)
        for i, head in enumerate(HEADS):
            share = averaged(lambda r: metric(r, "heads")[i] / r["n"])
            values = [measured(own, x, base_name(name)[0], share)] + [
                measured(own, x, name, share, severity=k) for k in range(1, 6)]
            height = np.array([100 * np.mean(v) if v else 0 for v in values])
            ax.bar(range(6), height, 0.8, bottom, color=HEAD_COLOURS[head], label=head)
            bottom += height
        ax.set_title(f"{x} ({own[0]['rule']})\n{heading(rows, name)}", fontsize=10)
        ax.set_xticks(range(6))
        ax.set_ylim(0, 100)
    for ax in axes[-1]:
        ax.set_xlabel("severity (0 = clean)")
    for ax in axes[:, 0]:
        ax.set_ylabel("share of the images, %")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
               frameon=False, title="head that answered")
    return fig


FIGURES = {"severity.png": "accuracy against severity",
           "pareto.png": "accuracy against training time", "heads.png": "head that answered"}


def figures(rows: list[dict]) -> dict:
    """{name in FIGURES: matplotlib figure} of what the rows hold.  Raises: ImportError without
    matplotlib."""
    rows = labelled(latest(rows))
    g = groups(rows)
    wide = [s for s in dict.fromkeys(r["set"] for r in rows) if len(cells(s)) > 1]
    made = (severity_figure(rows, wide) if wide else None,
            pareto_figure(rows, g.shifts) if g.shifts else None,
            heads_figure(rows, wide) if wide else None)
    return {name: figure for name, figure in zip(FIGURES, made) if figure is not None}


@torch.no_grad()
def picture_grid(student: Student, sets: dict[str, ImageSet], passes: int, rule: str,
                 columns: int = 8) -> Image.Image:
    """Sample pictures, clean, corrupted and shifted: what each head said and which one answered."""
    conditions = [(name, None) for name in sets] + [
        (next(iter(sets)), (c, 4))
        for c in ("gaussian_noise", "glass_blur", "snow", "contrast", "pixelate")]
    side, font = 96, ImageFont.load_default(9)
    sheet = Image.new("RGB", (110 + columns * (side + 34), len(conditions) * (side + 44)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, cell) in enumerate(conditions):
        images, top = sets[name], row * (side + 44)
        picks = np.linspace(0, len(images) - 1, columns).astype(int)
        x, y, index = images.__getitems__([(0, int(p)) for p in picks])
        x = corrupt(x, *cell, index=index.tolist()) if cell else x
        f = student.features(x.to(pick_device()))
        mean, sigma, logits = (m.cpu() for m in student.moments(f, passes, images.project))
        head = select(mean, sigma, rule, logits=logits, y=y)
        pen.text((4, top + side // 2), f"{cell[0]} {cell[1]}" if cell else name, "black", font)
        for i in range(len(x)):
            left = 110 + i * (side + 34)
            picture = Image.fromarray(x[i].permute(1, 2, 0).numpy()).resize((side, side))
            sheet.paste(picture, (left, top))
            for h, probs in enumerate(mean[i]):
                p, k = probs.max(0)
                text = (f"{'>' if h == head[i] else ' '}{HEADS[h][:5]} "
                        f"{images.classes[k][:10]} {p:.2f}")
                pen.text((left, top + side + 1 + 12 * h), text,
                          "darkgreen" if k == y[i] else "firebrick", font)
    return sheet


# ==== 11. BENCH ====
# In: nothing.  Out: rows of ours against what a user would pick instead: the same images, threads
# and settings, in turns within one run, so that a busy machine slows both alike.


def paired(ours: Callable, theirs: Callable | None, n: int, n_theirs: int, rounds: int = 5) -> dict:
    """{"ours", "theirs", "ratio", "spread"}: median images/s and ratio over the rounds, and the
    least and largest ratio; None for theirs where there is no such package."""
    seconds = []
    for _ in range(rounds + 1):                       # the first round warms up
        marks = [time.perf_counter()]
        for call in filter(None, (ours, theirs)):
            call()
            marks.append(time.perf_counter())
        seconds.append(np.diff(marks))
    rates = np.array([n, n_theirs])[:len(seconds[0])] / np.array(seconds[1:])
    if theirs is None:
        return {"ours": round(float(np.median(rates)), 1), "theirs": None, "ratio": None,
                "spread": None}
    ratios = rates[:, 0] / rates[:, 1]
    mine, other = np.median(rates, 0).tolist()
    return {"ours": round(mine, 1), "theirs": round(other, 1),
            "ratio": round(float(np.median(ratios)), 2),
            "spread": [round(float(f(ratios)), 2) for f in (np.min, np.max)]}


def bench_images(n: int, size: int) -> Tensor:
    """uint8 (n,3,size,size): shapes with their textures, smooth areas and edges."""
    return v2.functional.resize(make_shapes(n, 128, "test")[0], [size, size], antialias=True)


def _if_it_runs(call: Callable) -> Callable | None:
    """The call, or None where it fails: the public packages are old, and break part by part with
    newer NumPy and scikit-image."""
    try:
        call()
    except Exception:
        return None
    return call


def bench_corruptions(size: int = 224, n: int = 64, severity: int = 3) -> list[dict]:
    """Every corruption against the PyPI package imagecorruptions or imagenet_c, where installed."""
    x = bench_images(n, size)
    package = next((p for p in ("imagecorruptions", "imagenet_c")
                    if importlib.util.find_spec(p)), None)
    other = importlib.import_module(package) if package else None
    pictures = [np.ascontiguousarray(i) for i in x[:8].permute(0, 2, 3, 1).numpy()]
    rows = []
    for name in CORRUPTIONS:
        few = pictures[:1] if name == "glass_blur" else pictures     # a Python loop over the pixels
        theirs = other and _if_it_runs(
            lambda: [other.corrupt(p, severity=severity, corruption_name=name) for p in few])
        row = paired(lambda: corrupt(x, name, severity), theirs, n, len(few), 3)
        rows.append({"part": name, "against": package, **row})
    for part, names in (("the 15", CORRUPTIONS_15), ("the 14 without glass_blur", [
            c for c in CORRUPTIONS_15 if c != "glass_blur"])):
        some = [r for r in rows if r["part"] in names]
        ours, theirs = (len(some) / sum(1 / r[k] for r in some) if all(r[k] for r in some) else None
                        for k in ("ours", "theirs"))
        rows.append({"part": part, "against": package, "ours": round(ours, 1), "spread": None,
                     "theirs": theirs and round(theirs, 1),
                     "ratio": theirs and round(ours / theirs, 2)})
    return rows


def bench_augment(size: int = 224, n: int = 64) -> list[dict]:
    """AugMix alone against torchvision v2, as a JSD sample (picture and two views) against timm.

    Severity 3 and the paper's nine operations on all sides; timm also as its factory sets it up."""
    from timm.data.auto_augment import AugMixAugment, augment_and_mix_transform, augmix_ops
    g, x = rng("bench"), bench_images(n, size)
    images = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in x]
    nine = ["AutoContrast", "Equalize", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing",
            "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"]
    fair = {"magnitude_std": float("inf"), "interpolation": Image.BILINEAR}
    vision, views = v2.AugMix(3, all_ops=False), lambda: augmix(x, g, severity=3)
    timms = {"timm, the nine operations": AugMixAugment(augmix_ops(3, fair, nine)),
             "timm": augment_and_mix_transform("augmix-m3")}
    rows = [{"part": "augmix", "against": "torchvision v2", **paired(
        views, lambda: torch.stack([vision(i) for i in x]), n, n)}]
    for name, t in timms.items():
        rows.append({"part": "augmix + JSD sample", "against": name, **paired(
            lambda: torch.stack([x, views(), views()]),
            lambda: np.stack([np.asarray(v) for i in images for v in (i, t(i), t(i))]), n, n)})
    return rows


BENCHES = {"corruptions": bench_corruptions, "augment": bench_augment}


# ==== 12. COMMANDS ====
# In: the command line.  Out: files under runs/NAME, a few lines on the terminal, an exit code:
# 0 done, 2 a mistake that the message explains, 130 interrupted and ready to go on.


def write_config(cfg: Config) -> None:
    """runs/NAME/config.yaml: the resolved config."""
    if world()[0] == 0:
        text = yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False)
        write_atomically(cfg.dir / "config.yaml", lambda p: p.write_text(text))
    barrier()


def _made(path: Path, key: dict) -> bool:
    """Whether a stage's file is there.  Raises: UserError when it was made with other settings."""
    if not path.is_file():
        return False
    changed = differences(read_meta(path).get("key", {}), key)
    if changed:
        raise UserError(f"{path} was made with other settings ({changed}): take another run=NAME, "
                        "or delete it to make it again")
    say(f"{key['stage']}: {path} is there, kept")
    return True


def _stage_key(cfg: Config, stage: str, **more) -> dict:
    """The settings that a stage's result depends on."""
    data = {k: getattr(cfg.data, k) for k in ("name", "size_px", "n_train")}
    if cfg.data.classes and not (stage == "pretrain" and cfg.model.head == "text"):
        data["classes"] = cfg.data.classes
    if cfg.model.head == "text":
        more["prompts"] = [f and file_sha(f) for f in (
            cfg.data.names, cfg.model.templates, cfg.model.vocabulary)]
    return {"seed": cfg.seed, "data": data, "stage": stage,
            stage: dataclasses.asdict(getattr(cfg, stage)), **more}


def _finish(path: Path, module: nn.Module, stats: dict, key: dict, **more) -> Path:
    """Writes a stage's weights and drops its checkpoint."""
    if world()[0] == 0:
        save_weights(path, module, describe(module, key=key, train=stats, **more))
        ckpt = path.parent / f"{key['stage']}.ckpt"
        ckpt.unlink(missing_ok=True)
    barrier()
    say(f"{path}: {stats['images']:,} images in {stats['seconds']:.0f} s")
    return path


@functools.cache
def own_view(name: str) -> View:
    """How the network of that name wants picture files to be cut."""
    return named(name, 2, "random").view


def training_images(cfg: Config, part: str = "") -> ImageSet:
    """The training images of all classes or of a part, in the student's own view."""
    return open_set(cfg.data.name + part, cfg.data, "train", own_view(cfg.model.student))


def tuning_set(cfg: Config) -> ImageSet:
    """The training images of the classes to tune on."""
    return training_images(cfg, "@seen" if cfg.data.classes else "")


def _train(cfg: Config, key: dict, module: nn.Module, step: Callable, images: ImageSet) -> dict:
    """fit with the settings of the stage that key names."""
    return fit(module, step, images, getattr(cfg, key["stage"]), cfg.runtime, out=cfg.dir,
               name=key["stage"], seed=cfg.seed, key=key, workers=cfg.data.workers)


def _train_tail(cfg: Config, key: dict, net: Net, tune: int, images: ImageSet,
                aug: Robustify | None) -> dict:
    """Trains the last `tune` stages and the classifier of a plain network, in place; tune = 0: the
    linear layer alone."""
    backbone, tail = cut(net.to(pick_device()), tune)
    part = Tail(tail.requires_grad_(True))
    tail[-1].features.requires_grad_(tune > 0)
    return _train(cfg, key, part, tail_step(backbone, getattr(cfg, key["stage"]), aug), images)


def _fit_probe(cfg: Config, net: Net, images: ImageSet) -> dict:
    """Puts a linear probe in the place of the network's classifier: features once, then L-BFGS."""
    since, fc = time.perf_counter(), stages(net)[-1].fc
    weight, bias, l2 = fit_probe(
        frozen_features(net.to(pick_device())), images, seed=cfg.seed, batch=cfg.eval.batch,
        amp=cfg.runtime.amp, workers=cfg.data.workers)
    fc.load_state_dict({"weight": weight, "bias": bias})
    say(f"pretrain: linear probe on {len(images):,} images, l2 = {l2:.3g}")
    return {"images": len(images), "seconds": round(time.perf_counter() - since, 2)}


def net_for(cfg: Config, name: str, images: ImageSet, weights: str | None) -> Net:
    """The network for the classes of a set: with a text head if model.head asks for it and the
    network has a text tower, else with a linear one."""
    if cfg.model.head != "text" or not has_text(name):
        return build(name, len(images.classes), weights)
    cache = cfg.dir / "text"
    if weights and "prompts" in read_meta(weights) and "both towers" not in read_meta(weights):
        return zero_shot(load(weights), images, cfg.model.templates, cache)
    return zero_shot_net(name, prompts_of(images, cfg.model.templates), weights, cache)


def _pretrain_towers(cfg: Config, path: Path, key: dict) -> Path:
    """Trains both towers of a clip-tiny: network on captions, those of all classes."""
    if not cfg.model.student.startswith("clip-tiny:"):
        raise UserError(f"{cfg.model.student} cannot be pretrained with a text head: name a tag "
                        "(open_clip:ViT-B-32-quickgelu/openai) or give model.student_weights")
    images = training_images(cfg)
    captioned = images.captioned().subset(cfg.pretrain.n_images)
    towers = TinyClip(build(cfg.model.student))
    towers.name, towers.n_classes, towers.towers = cfg.model.student, len(images.classes), {}
    towers.size_px = 0
    towers.prompts = prompts_of(images, cfg.model.templates)
    stats = _train(cfg, key, towers, contrastive_step(captioned.classes), captioned)
    return _finish(path, towers, stats, key, **{"both towers": True})


def pretrain(cfg: Config, images: ImageSet | None = None) -> Path:
    """Trains the student on clean data -> student.safetensors (kept if it is there)."""
    path = cfg.dir / "student.safetensors"
    weights = cfg.model.student_weights
    key = _stage_key(cfg, "pretrain", model=cfg.model.student,
                     **({"weights": file_sha(weights)} if weights else {}))
    if _made(path, key):
        return path
    write_config(cfg)
    torch.manual_seed(fold(cfg.seed, "init student"))
    if cfg.model.head == "text":
        return _pretrain_towers(cfg, path, key)
    images = images or tuning_set(cfg)
    net = build(cfg.model.student, len(images.classes), weights or None)
    stage, images = cfg.pretrain, images.subset(cfg.pretrain.n_images)
    if stage.tune == 0:
        stats = _fit_probe(cfg, net, images)
    elif stage.tune > 0:
        stats = _train_tail(cfg, key, net, stage.tune, images, None)
    else:
        stats = _train(cfg, key, net, clean_step(stage.smoothing), images)
    return _finish(path, net, stats, key)


def student_path(cfg: Config, images: ImageSet) -> str | None:
    """The student's weights file, made by pretrain when there is none; None = by the name's tag."""
    weights, name = cfg.model.student_weights, cfg.model.student
    if cfg.model.head == "text":
        return weights or (None if has_tag(name) else str(pretrain(cfg)))
    if weights and (read_meta(weights) or not lacks_head(named(name, 2, "random"), weights)):
        return weights
    if not weights and tag_classes(name) == len(images.classes):
        return None
    if not (cfg.dir / "student.safetensors").is_file():
        say(f"{weights or name} has no classifier for these {len(images.classes)} classes: "
            "pretrain comes first")
    return str(pretrain(cfg, images))


def robustify(cfg: Config, images: ImageSet | None = None) -> Path:
    """Trains the small teacher to be robust -> teacher.safetensors (kept if it is there)."""
    path = cfg.dir / "teacher.safetensors"
    key = _stage_key(cfg, "robustify", model=cfg.model.teacher)
    if _made(path, key):
        return path
    write_config(cfg)
    images = images or tuning_set(cfg)
    torch.manual_seed(fold(cfg.seed, "init teacher"))
    net = net_for(cfg, cfg.model.teacher, images, None)
    stats = _train(cfg, key, net, robust_step(cfg.robustify, len(images.classes)),
                   extended(images.subset(cfg.robustify.n_images), cfg.robustify.extra))
    return _finish(path, net, stats, key)


def vocabulary(cfg: Config, images: ImageSet) -> list[str]:
    """The texts that anchor a zero-shot student (distill.anchor), none for other students."""
    if cfg.model.head != "text" or cfg.distill.method != "erpm" or not cfg.distill.anchor:
        return []
    if cfg.model.vocabulary:
        return read_lines(cfg.model.vocabulary, "model.vocabulary")
    if not images.captions:
        raise UserError(f"distill.anchor: {images.name} has no captions: give model.vocabulary, a "
                        "file of texts, a line each, or distill.anchor=0")
    return sorted(set(images.captions))


def distill(cfg: Config, images: ImageSet | None = None) -> Path:
    """Tunes the large network -> model.safetensors; a missing student or teacher is made first."""
    images = images or tuning_set(cfg)
    d, path = cfg.distill, cfg.dir / "model.safetensors"
    student_file = student_path(cfg, images)
    teacher_file = cfg.model.teacher_weights
    if d.method == "erpm" and not teacher_file:
        if not (cfg.dir / "teacher.safetensors").is_file():
            say("distill: no robust teacher yet: robustify comes first")
        teacher_file = str(robustify(cfg, images))
    key = _stage_key(cfg, "distill", augment=cfg.robustify.augment,
                     severity=cfg.robustify.severity, student=cfg.model.student,
                     files=[file_sha(f) if f else "" for f in (student_file, teacher_file)])
    if _made(path, key):
        return path
    write_config(cfg)
    net = net_for(cfg, cfg.model.student, images, student_file)
    texts = vocabulary(cfg, images)
    images = images.subset(d.n_images)
    if d.method != "erpm":
        stats = _train_tail(cfg, key, net, d.tune if d.method == "apt" else 0, images,
                            cfg.robustify)
        return _finish(path, net, stats, key)
    device = pick_device()
    student = Student(net, d.tune, d.head, d.dropout, len(images.classes), dropout_in=d.dropout_in)
    teacher = freeze(net_for(cfg, cfg.model.teacher, images, teacher_file)).to(device)
    wide = student.to(device)
    if texts:                    # the same weights, with the vocabulary behind the classes
        more = class_embeddings(net.name, net.towers, Prompts(texts, ("{}",)), cfg.dir / "text")
        wide = with_text(student, torch.cat([student.original[-1].fc.weight.cpu(), more]))
    stats = _train(cfg, key, wide.tuned, erpm_step(wide, teacher, d, cfg.robustify), images)
    return _finish(path, student, stats, key)


def corrupted(name: str) -> str:
    """The name of a set's ImageNet-C-like copy."""
    return (name.replace("folder:", "folder-c:", 1) if name.startswith("folder:") else f"{name}-c")


def default_sets(cfg: Config) -> list[str]:
    """eval.sets, or the training set, its corrupted copy and its renditions."""
    if cfg.eval.sets:
        return [s.strip() for s in cfg.eval.sets.split(",") if s.strip()]
    name, side = cfg.data.name, "@seen" * bool(cfg.data.classes)
    names = [name, corrupted(name), *([f"{name}-r"] if f"{name}-r" in SETS else [])]
    return [n + side for n in names]


def all_sets(home: str) -> list[str]:
    """Every set, and the corrupted copies of a network's own (ImageNet's: and ObjectNet's): on sets
    of other classes [A] looks at clean images alone."""
    own = [home, *["objectnet"] * (home == "imagenet")]
    return list(dict.fromkeys([*SETS, home, *map(corrupted, own)]))


def with_companions(names: Sequence[str]) -> list[str]:
    """The names, each set of some of ImageNet's classes followed by the clean images of the same
    classes: imagenet-a, imagenet@a."""
    return list(dict.fromkeys(n for name in names for n in (name, SAME_CLASSES.get(name)) if n))


def preflight(cfg: Config, training: bool) -> None:
    """Raises: UserError for what would stop a long job late: unknown names, absent weights files,
    networks that cannot be cut, rules without sigma."""
    choose(dict.fromkeys(RULES), cfg.eval.rule, "rule")
    spec_names(cfg.robustify.augment)
    for base in (base_name(name)[0] for name in default_sets(cfg) if name != "all"):
        if not base.startswith("folder:"):
            set_row(base)
    for key, file in (("data.names", cfg.data.names), ("model.templates", cfg.model.templates),
                      ("model.vocabulary", cfg.model.vocabulary)):
        if file:
            read_lines(file, key)
    if training and cfg.model.head == "text" and not has_text(cfg.model.student):
        two_towers(cfg.model.student)                                            # says what has
    if training:
        for path in filter(None, (cfg.model.student_weights, cfg.model.teacher_weights)):
            read_meta(path)
        for name in (cfg.model.student, cfg.model.teacher):
            tag_classes(name)
        cut(named(cfg.model.student, 2, "random"), cfg.distill.tune)
        teacher, weights = named(cfg.model.teacher, 2, "random"), cfg.model.teacher_weights
        text = cfg.model.head == "text" and has_text(cfg.model.teacher)
        if weights and not text and lacks_head(teacher, weights):
            raise UserError(f"{weights} has no classifier: model.teacher_weights wants those of a "
                            "whole network, or leave it empty and let robustify make them")
        d = cfg.distill
        if cfg.eval.rule in NEEDS_SIGMA and d.method == "erpm" and not d.dropout:
            raise UserError(f"distill.dropout=0: sigma would be 0 and eval.rule={cfg.eval.rule} "
                            "needs it; set a rate above 0, or eval.rule=kl")
    lost = [f for f in ICE_FILES if not (Path(cfg.eval.frost_dir) / f).is_file()]
    if cfg.eval.frost_dir and lost:
        raise UserError(f"eval.frost_dir: no {lost[0]} in {cfg.eval.frost_dir} (the textures are "
                        f"{', '.join(ICE_FILES)})")


def weights_sha(net: nn.Module) -> str:
    """First 12 hex digits of a hash of the network's tensors."""
    h, texts = hashlib.sha256(), {f"{n}.weight" for n, m in net.named_modules()
                                  if isinstance(m, TextHead)}
    for k, v in net.state_dict().items():
        if k in texts:                                   # they change with the set: see "prompts"
            continue
        h.update(k.encode())
        h.update(v.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()[:12]


def entry(label: str, net: nn.Module, meta: dict, home: str) -> Entry:
    """A network ready to be scored."""
    return Entry(label, net.to(pick_device()), weights_sha(net), meta, home)


def entries_of(cfg: Config) -> list[Entry]:
    """The networks of a run: original student, teacher, baselines, model."""
    run, m, home, files = cfg.dir, cfg.model, cfg.data.name, []
    for f in filter(Path.is_file, [*sorted(run.glob("*/model.safetensors")),
                                   run / "model.safetensors"]):
        key = read_meta(f).get("key", {})
        if key.get("stage", "distill") != "distill":
            raise UserError(f"{f} was made by {key['stage']}, not by distill: put it back in its "
                            "place, and run distill")
        files.append((LABELS[key.get("distill", {}).get("method", "erpm")], f))
    own = [(label, run / f"{name}.safetensors") for label, name in
           (("original", "student"), ("teacher", "teacher"))]
    entries = [entry(label, load(f), read_meta(f), home) for label, f in own if f.is_file()]
    models = [entry(label, load(f), read_meta(f), home) for label, f in files]
    if not entries and not models:
        raise UserError(f"no trained network in {run}: run `python erpm.py distill` first, or name "
                        "another run")
    labels = {e.label for e in entries}
    for label, name, weights in (("original", m.student, m.student_weights),
                                 ("teacher", m.teacher, m.teacher_weights)):
        if models and label not in labels and (weights or label == "original" and has_tag(name)):
            own = getattr(models[-1].model, "prompts", None)
            net = zero_shot_net(name, own, weights or None, run / "text") \
                if own and has_text(name) else \
                named(name, models[-1].model.n_classes, weights or None)
            entries.append(entry(label, freeze(net), {}, home))
    return [*entries, *models]


class Token(NamedTuple):
    """A network of eval.models: [LABEL@][probe:]NAME[=WEIGHTS_FILE]."""
    label: str
    probe: bool
    name: str
    path: str


def read_token(token: str) -> Token:
    """The parts of a token.  Raises: UserError on an unknown name, on one without weights and on an
    absent file."""
    front, _, path = token.partition("=")
    label, _, front = front.rpartition("@")
    name = front.removeprefix("probe:")
    if path:
        named(name, None, "random")
        read_meta(path)
    elif name.startswith("run:"):
        read_meta(run_file(name[4:]))
    elif has_tag(name):
        tag_classes(name)
    else:
        named(name)
        raise UserError(f"--model {name} has no weights: add a pretrained tag "
                        "(timm:resnet50.tv_in1k) or a file (NAME=WEIGHTS_FILE), or name what a "
                        "run made (run:runs/x)")
    return Token(label or token, name != front, name, path)


def file_classes(name: str, path: str) -> int | None:
    """Number of outputs of the classifier in a weights file; None where it has none."""
    state = read_state(path)
    return next((len(state[k]) for k in _head_keys(named(name, None, "random").net)
                 if k in state), None)


def model_entry(token: str) -> Entry:
    """A network of eval.models.  With a text tower it is zero-shot: it takes the classes of each
    set.  Else its classes are those of the set that it was trained on, where it is ours, and
    ImageNet's, where it is a public one with 1000 outputs.  probe: only its features count."""
    label, probe, name, path = read_token(token)
    meta = read_meta(path) if path else {}
    if name.startswith("run:"):
        meta = read_meta(run_file(name[4:]))
    headless = not path and has_tag(name) and tag_classes(name) == 0     # MAE, DINOv2: for a probe
    if not has_text(name) or probe:
        n = meta.get("classes") or path and file_classes(name, path) or None
        net = build(name, 1 if headless else n, path or None)
    elif "prompts" in meta and "both towers" not in meta:
        net = load(path)
    else:
        net = zero_shot_net(name, Prompts(("object", "place"), ("{}",)), path or None)
    home = meta.get("key", {}).get("data", {}).get("name", "")
    if not home and name.startswith(("timm:", "torchvision:")) and net.n_classes == len(synsets()):
        home = "imagenet"
    return dataclasses.replace(entry(label, freeze(net), meta, home), probe=probe)


def networks(cfg: Config) -> Iterator[tuple[list[Entry], View]]:
    """The networks to score, in groups that see the same pixels: those of a run, with the student's
    own view of picture files; or one by one eval.models."""
    if not cfg.eval.models:
        entries = entries_of(cfg)
        views = [e.model.view for e in entries if e.model.name == cfg.model.student]
        yield entries, views[0] if views else own_view(cfg.model.student)
        return
    tokens = list(dict.fromkeys(t.strip() for t in cfg.eval.models.split(",") if t.strip()))
    for token in tokens:
        read_token(token)
    for token in tokens:
        try:
            e = model_entry(token)
        except UserError as error:
            others = ",".join(t for t in tokens if t != token)
            raise UserError(f"{token}: {error}" + (
                f"; what is scored is kept; to leave it out: --model {others}" if others else "")
            ) from None
        yield [e], getattr(e.model, "view", View())


def _job(name: str, entries: list[Entry], view: View, cfg: Config,
         trains: dict[str, ImageSet]) -> Job:
    """A set ready to be scored; trains: the training splits that are open already."""
    images, home = open_set(name, cfg.data, view=view), family(name)
    able = [e for e in entries if getattr(e.model, "prompts", None)] \
        if class_side(name)[1] == "unseen" else entries      # other heads know seen classes only
    heads = {e.label: head_for(e, name, images, cfg) for e in able}
    prompts = f"{fold(prompts_of(images, cfg.model.templates)):016x}" \
        if "zero-shot" in heads.values() else ""
    strange = [label for label, head in heads.items() if head.startswith("linear probe")]
    if not strange:
        return Job(images, heads, None, prompts)
    why, few = (f"{name}: its classes are not the outputs of {', '.join(strange)}, and there are "
                "no training images for a linear probe"), "no training images for a linear probe"
    if home in SETS and not SETS[home].n_train:
        raise Absent(f"{why}: {home} has no training split", few)
    try:
        trains[home] = trains.get(home) or open_set(home, cfg.data, "train", view)
    except Absent as e:
        raise Absent(f"{why}: {e}", few) from None
    except UserError as e:
        raise UserError(f"{why}: {e}") from None
    return Job(images, heads, trains[home], prompts)


def plan(entries: list[Entry], view: View, cfg: Config) -> tuple[dict[str, Job], dict[str, str]]:
    """(the sets to score, {name: reason} of those that nobody named and that cannot be).

    Raises: UserError on a set that was asked for by name and is absent, on one that is half
    unpacked, and on one that needs a linear probe and has no training images."""
    asked, jobs, lost = default_sets(cfg), {}, {}
    home = next((e.home for e in entries if e.home), "imagenet")
    names = [n for name in asked for n in (all_sets(home) if name == "all" else [name])]
    trains: dict[str, ImageSet] = {}
    companion_of = {b: a for a, b in SAME_CLASSES.items() if b not in names}
    for name in with_companions(names):
        if name in companion_of and companion_of[name] not in jobs:
            continue
        try:
            jobs[name] = _job(name, entries, view, cfg, trains)
        except UserError as e:
            if name in asked or not isinstance(e, Absent) and name not in companion_of:
                raise
            lost[name] = e.reason if isinstance(e, Absent) else str(e)
    return jobs, lost


def headline(rows: list[dict], rule: str) -> list[dict]:
    """The rows with the rule of the headline figures set to `rule`."""
    return [r | {"rule": rule} for r in rows]


def summary(rows: list[dict]) -> str:
    """The figures of every network on every set, means over the cells, in percent but NLL."""
    groups: dict[tuple, list[dict]] = {}
    for r in latest(rows):
        groups.setdefault((r["label"], r["set"], r["head"]), []).append(r)
    body = []
    for (label, name, head), some in groups.items():
        figures = [f"{scale * measure(some):.{4 if scale == 1 else 2}f}"
                   for measure, scale in MEASURES.values()]
        whole = len(some) == len(cells(name))
        how = head + f", rule {some[0]['rule']}" * ("rules" in some[0])
        body.append([label, name, how, some[0]["n"], *(figures if whole else ["missing"] * 4)])
    return table(["model", "set", "head", "images a cell", *MEASURES], body)


def run_eval(cfg: Config, args) -> None:
    """Scores a run's networks, or those of --model, on sets -> results.jsonl."""
    said, asked = "", set()
    for name in default_sets(cfg):
        if name != "all":
            open_set(name, cfg.data)          # told before a network is read: what is not there
    for entries, view in networks(cfg):
        jobs, lost = plan(entries, view, cfg)
        line = "\n".join(f"left out, {reason}: {', '.join(n for n in lost if lost[n] == reason)}"
                         for reason in dict.fromkeys(lost.values()))
        if lost and line != said:
            say(line)
        said = line
        cfg.dir.mkdir(parents=True, exist_ok=True)
        if cfg.eval.models and not from_first((cfg.dir / "config.yaml").is_file):
            write_config(cfg)                            # `report --run` looks for it
        asked |= score(entries, jobs, cfg, cfg.dir)
    if world()[0]:
        return
    rows = headline([r for r in read_rows(cfg.dir) if row_key(r) in asked], cfg.eval.rule)
    say(summary(rows) if rows else "nothing to score")
    if args.check_known:
        say(check_known(rows))
    say(f"results: {cfg.dir / 'results.jsonl'}; for tables and figures: report --run {cfg.dir}")


def write_figures(rows: list[dict], out: Path) -> list[str]:
    """Writes the figures and returns their names; without matplotlib says what was left out."""
    try:
        drawn = figures(rows)
    except ImportError:
        say(f"{', '.join(FIGURES)} left out: matplotlib is not installed (pip install matplotlib)")
        return []
    for name, figure in drawn.items():
        write_atomically(out / name, lambda p: figure.savefig(p, format="png"))
        say(f"{out / name} written")
    return list(drawn)


def write_pictures(rows: list[dict], cfg: Config, run: Path) -> None:
    """Writes pictures.png of a run's Student, where its images are there."""
    model, g = run / "model.safetensors", groups(rows)
    if not model.is_file() or "student" not in read_meta(model):
        return
    names = [s for s in dict.fromkeys(r["set"] for r in rows)
             if s in (g.home, *g.shifts) and len(cells(s)) == 1]
    try:
        sets = {n: open_set(n, cfg.data) for n in names}
    except UserError as e:
        return say(f"pictures.png left out: {e}")
    if sets:
        picture = picture_grid(load(model).to(pick_device()), sets, cfg.eval.passes, cfg.eval.rule)
        write_atomically(run / "pictures.png", lambda p: picture.save(p, "png"))
        say(f"{run / 'pictures.png'} written")


def run_report(cfg: Config, args) -> None:
    """results.jsonl of one or more runs -> report.md and pictures in the first one."""
    if world()[0]:
        return
    runs = [Path(r) for r in (args.run or str(cfg.dir)).split(",")]
    rows = headline([r for run in runs for r in read_rows(run)], cfg.eval.rule)
    if not rows:
        raise UserError(f"no results in {', '.join(map(str, runs))}: run `python erpm.py eval` "
                        "first")
    text = report_text(rows)
    say(text.partition(f"\n## {APPENDIX}")[0])
    links = [f"![{FIGURES[name]}]({name})" for name in write_figures(rows, runs[0])]
    text += "\n".join(["\n## Figures\n", *links, ""]) * bool(links)
    write_atomically(runs[0] / "report.md", lambda p: p.write_text(text))
    say(f"{runs[0] / 'report.md'} written")
    write_pictures(rows, cfg, runs[0])


def run_demo(cfg: Config, args) -> None:
    """Everything: the three stages, the baselines lp and apt, eval and report."""
    since = time.perf_counter()
    images = tuning_set(cfg)
    student = student_path(cfg, images)
    teacher = cfg.model.teacher_weights or str(robustify(cfg, images))
    for method in ("lp", "apt") if cfg.model.head == "linear" else ():
        sub = dataclasses.replace(
            cfg, run=f"{cfg.run}/{method}", distill=dataclasses.replace(cfg.distill, method=method),
            model=dataclasses.replace(cfg.model, student_weights=student or "",
                                      teacher_weights=teacher))
        distill(sub, images)
    distill(cfg, images)
    run_eval(cfg, args)
    run_report(cfg, args)
    say(f"demo: {time.perf_counter() - since:.0f} s in all")


class _Opener(torch.utils.data.Dataset):
    """Item paths: (how many, what is wrong with those that cannot be read)."""

    def __getitem__(self, paths: Sequence[str]) -> tuple[int, list[str]]:
        broken = []
        for path in paths:
            try:
                read_picture(path)
            except UserError as e:
                broken.append(str(e))
        return len(paths), broken


def _paths_of(sets: Sequence[ImageSet], faults: list[str]) -> Iterator[list[str]]:
    """The image files of the sets, of -c archives those of all cells, in lists of up to 64; what is
    wrong with their numbers goes to faults."""
    for images in sets:
        for cell in cells("folder-c:") if images.cells_dir else [None]:
            try:
                found = open_cell(images, cell)[0]
            except UserError as e:
                faults.append(str(e))
                continue
            if found.partial:
                faults.append(f"{found.name}: {len(found.y):,} images in {found.source}, expected "
                              f"{found.expected:,}")
            for i in range(0, len(found.paths or ()), 64):
                yield found.paths[i:i + 64]


def check_images(sets: Sequence[ImageSet], workers: int) -> tuple[int, list[str]]:
    """(how many image files were opened, what is wrong with them or their numbers, a line each)."""
    n, faults = 0, []
    with progress(0, "check") as bar, Signals() as signals:
        for opened, broken in forked(_Opener(), workers, batch_size=None,
                                     sampler=_paths_of(sets, faults)):
            bar.update(opened)
            n += opened
            faults += broken
            if signals.hit:
                raise Interrupted("sets --check stopped")
    return n, faults


def run_sets(cfg: Config, args) -> None:
    """The table of sets: what is there, what is expected, how to get it; --check: opens all."""
    if world()[0]:
        return
    data = dataclasses.replace(cfg.data, allow_partial=True, n_train=0, n_test=0)
    body, found, faults = [], [], []
    for name in (*SETS, *(f"{n}-c" for n, r in SETS.items() if r.archive or n == "objectnet")):
        row, corrupted = set_row(name), base_name(name)[1]
        count, where = "-", ((row.archive if corrupted else ()) or row.folders or "-")[0]
        get = row.get.replace("ROOT", cfg.data.root).split("; -c: ")[-1 if corrupted else 0]
        try:
            images = open_set(name, data)
            count, where = f"{len(images.y):,}", str(images.cells_dir or images.source)
            if images.made == "regenerated":
                where = f"made from {row.name}"
            else:
                found.append(images)
            if args.check and row.n_train and row.folders and not corrupted:
                found.append(open_set(name, data, "train"))
        except Absent:
            pass
        except UserError as e:
            count = "spoilt"
            faults.append(str(e))
        body.append([name, count, f"{row.n_test:,}", row.n_classes, where, get])
    if not Path(cfg.data.root).is_dir():
        say(f"data.root={cfg.data.root} is no folder: only what is made here is found\n")
    say(table(["set", "found", "expected", "classes", f"where (- : below {cfg.data.root})",
               "how to get it"], body))
    say("""
Counts of -c sets are of one of their 75 cells.  NAME-c of any set is made on the fly, as
ImageNet-C was, where no archive of it is there.  imagenet@a, imagenet@r and imagenet@objectnet: the
images of these sets' classes.  folder:PATH and folder-c:PATH take any PATH/CLASS/IMAGE tree, with
PATH/train and PATH/val to train on it.""")
    if args.check:
        n, more = check_images(found, cfg.data.workers or os.cpu_count())
        faults += more
        say(f"{n:,} image files opened")
    for line in faults:
        say(line)
    if args.check and faults:
        raise UserError(f"{len(faults)} faults in the sets below {cfg.data.root}, listed above")


def run_bench(cfg: Config, args) -> None:
    """Times our parts against the public ones -> bench.jsonl, and prints the ratios."""
    threads = torch.get_num_threads()
    for name in args.paths or BENCHES:
        bench = choose(BENCHES, name, "bench")
        torch.set_num_threads(1)
        rows = bench()
        torch.set_num_threads(threads)
        cfg.dir.mkdir(parents=True, exist_ok=True)
        with open(cfg.dir / "bench.jsonl", "a") as f:
            f.writelines(json.dumps({"bench": name, **r, "packages": versions()}) + "\n"
                         for r in rows)
        say(table(["part", "ours, images/s", "theirs, images/s", "ratio", "least, most",
                   "against"], [
            [r["part"], r["ours"], r["theirs"] or "-", r["ratio"] or "-", r["spread"] or "-",
             r["against"] or "not installed"] for r in rows]))


class _CorruptJobs(torch.utils.data.Dataset):
    """Item k writes the missing copies of image k and returns how many copies an image has."""

    def __init__(self, images: ImageSet, source: Path, out: Path, frost_dir: str | None):
        self.images, self.source, self.out, self.frost_dir = images, source, out, frost_dir

    def __getitem__(self, k: int) -> int:
        x, todo = None, cells("folder-c:")
        file = Path(self.images.paths[k]).relative_to(self.source)
        kind = Image.registered_extensions()[file.suffix.lower()]
        for name, severity in todo:
            path = self.out / name / str(severity) / file
            if path.is_file():
                continue
            x = self.images.__getitems__([(0, k)])[0] if x is None else x
            y = corrupt(x, name, severity, index=[k], frost_dir=self.frost_dir)[0]
            picture = Image.fromarray(y.permute(1, 2, 0).numpy())
            write_atomically(path, lambda p: picture.save(p, kind, quality=85))
        return len(todo)


def _claim(out: Path, settings: dict) -> None:
    """Makes the output folder ours, or finds it ours.  Raises: UserError on other content."""
    marker = out / "corrupt.json"
    if marker.is_file():
        changed = differences(json.loads(marker.read_text()), settings)
        if changed:
            raise UserError(f"{out} was made with other settings ({changed}): take another folder")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists with other content: nothing was written, take another "
                        "folder")
    else:
        write_atomically(marker, lambda p: p.write_text(json.dumps(settings)))


def corruption_grid(path: Path, size_px: int) -> Image.Image:
    """15 x 5 pictures of one image under every corruption and severity, named."""
    x = ImageSet("picture", [0], ["-"], View(size_px), paths=[path]).__getitems__([(0, 0)])[0]
    side, left, font = 112, 120, ImageFont.load_default(12)
    sheet = Image.new("RGB", (left + 6 * side, 15 * side), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(CORRUPTIONS_15):
        pen.text((4, row * side + side // 2), name, "black", font)
        views = [x, *(corrupt(x, name, s) for s in range(1, 6))]
        for k, view in enumerate(views):
            picture = Image.fromarray(view[0].permute(1, 2, 0).numpy()).resize((side - 2, side - 2))
            sheet.paste(picture, (left + k * side, row * side))
    return sheet


def run_corrupt(cfg: Config, args) -> None:
    """IN -> OUT/corruption/severity/class/name in parallel; what is there already is kept."""
    if len(args.paths) != 2:
        raise UserError("corrupt takes two paths: corrupt IN OUT (folders), or corrupt --grid "
                        "PICTURE GRID.png")
    source, out = map(Path, args.paths)
    size_px = cfg.data.size_px or 224
    if args.grid:
        if out.exists():
            raise UserError(f"{out} exists: nothing was written, take another name")
        grid = corruption_grid(source, size_px)
        return write_atomically(out, lambda p: grid.save(p, "png"))
    if not source.is_dir():
        raise UserError(f"no folder {source}: corrupt takes any tree of images")
    kinds = torchvision.datasets.folder.IMG_EXTENSIONS
    paths = sorted(p for p in source.rglob("*") if p.suffix.lower() in kinds)
    if not paths:
        raise UserError(f"no image below {source}")
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out} lies in {source}: take a folder beside it")
    if world()[0] == 0:
        _claim(out, {"source": str(source.resolve()), "images": len(paths), "size_px": size_px,
                     "seed": 0, "frost": frost_source(cfg.eval.frost_dir)})
    barrier()
    images = ImageSet(str(source), [0] * len(paths), ["-"], View(size_px), paths=paths)
    jobs = _CorruptJobs(images, source, out, cfg.eval.frost_dir or None)
    work = forked(jobs, cfg.data.workers or os.cpu_count(), batch_size=None,
                  sampler=range(world()[0], len(paths), world()[1]))
    with Signals() as signals, progress(len(paths) * len(cells("folder-c:")), "corrupt") as bar:
        for done in work:
            bar.update(done * world()[1])
            if signals.hit:
                raise Interrupted("corrupt stopped; the same command goes on from here")
    say(f"{out}: {len(paths):,} images x {len(cells('folder-c:'))} cells")


COMMANDS: dict[str, tuple[Callable, str]] = {
    "demo": (run_demo, "pretrain, robustify, distill, baselines, eval and report in one go"),
    "pretrain": (lambda cfg, args: pretrain(cfg), "train a network on clean data"),
    "robustify": (lambda cfg, args: robustify(cfg), "make the small teacher robust"),
    "distill": (lambda cfg, args: distill(cfg), "tune the large network with three heads"),
    "eval": (run_eval, "score a run or a network on sets"),
    "report": (run_report, "tables and pictures of results"),
    "bench": (run_bench, "speed against the public code, as ratios: bench [corruptions] [augment]"),
    "corrupt": (run_corrupt, "corrupt IN OUT: the ImageNet-C-like copy of a folder; --grid: of a "
                             "picture"),
    "sets": (run_sets, "the data sets: found or not, how to get them"),
}
TRAINING = ("demo", "pretrain", "robustify", "distill")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line's words."""
    lines = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    p = argparse.ArgumentParser(
        prog="erpm.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{__doc__.split('Sections:')[0]}\ncommands:\n{lines}",
        epilog="keys, given as key=value:\n" + config_help())
    p.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    p.add_argument("words", nargs="*", metavar="key=value", help="settings, see below; bench and "
                   "corrupt take names and paths too")
    p.add_argument("--grid", action="store_true", help="corrupt: one picture of a picture's copies")
    p.add_argument("--check", action="store_true", help="sets: open every image of every set")
    p.add_argument("--recipe", default="demo", help="recipe of config.yaml")
    p.add_argument("--config", type=Path, help="file of recipes instead of config.yaml")
    p.add_argument("--run", default="", help="folder of a run (eval, report; report takes several, "
                                             "joined by commas)")
    p.add_argument("--set", default="", help="eval: sets, joined by commas, or all")
    p.add_argument("--model", default="", help="eval: any networks by name instead of a run, "
                                               "joined by commas; see eval.models")
    p.add_argument("--check-known", action="store_true",
                   help="eval: compare with published figures")
    args = p.parse_intermixed_args(argv)
    free = args.command in ("bench", "corrupt")
    args.paths = [w for w in args.words if free and "=" not in w]
    args.words = [w for w in args.words if w not in args.paths]
    return args


def configure(args: argparse.Namespace) -> Config:
    """The Config of the command: for eval and report the run's own file, else the recipe."""
    words = [*args.words, *([f"eval.sets={args.set}"] if args.set else []),
             *([f"eval.models={args.model}"] if args.model else [])]
    cfg = resolve(args.recipe, words, args.config)
    if args.command in (*TRAINING, "bench", "corrupt", "sets"):
        return cfg
    if cfg.eval.models and not args.run and not any(w.startswith("run=") for w in words):
        return dataclasses.replace(cfg, run="models")
    if "," in args.run and args.command != "report":
        raise UserError(f"--run {args.run}: {args.command} takes one run, report takes several")
    run = Path(args.run.split(",")[0]) if args.run else cfg.dir
    if (run / "config.yaml").is_file():
        cfg = resolve("", words, run=run)
    elif args.run:
        made = sorted(str(p.parent) for p in run.parent.glob("*/config.yaml"))
        raise UserError(f"no run {run}: it has no config.yaml; runs in {run.parent}: "
                        f"{', '.join(made) or 'none'}")
    return dataclasses.replace(cfg, out=str(run.parent), run=run.name)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(pick_device())
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        cfg = configure(args)
        preflight(cfg, args.command in TRAINING)
        COMMANDS[args.command][0](cfg, args)
        return 0
    except UserError as e:            # from a loader process it comes with that process's traceback
        print(f"erpm.py: {str(e).strip().split('UserError: ')[-1]}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as e:
        print(f"erpm.py: {e or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:                          # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
