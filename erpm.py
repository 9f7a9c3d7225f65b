"""erpm.py makes a large pretrained image classifier robust to real-world shift, cheaply, and
without losing what the model already knew.

    python erpm.py demo                                       # everything, on data made here, CPU
    python erpm.py eval --model timm:resnet50.tv_in1k --set folder-c:photos      # a report card
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
import difflib
import functools
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import logging
import math
import operator
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from safetensors.torch import save as safetensors_bytes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from tqdm import tqdm


# ==== 1. BASICS ====
# Errors for people, seeds as functions of keys, and what a process knows of its siblings.
# Nothing here moves a global generator.


class UserError(ValueError):
    """A mistake that a person can mend: the message says what, where and what to do (exit 2)."""


class Absent(UserError):
    """A set, or what scoring it takes, is not there at all."""


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """A signal of STOPS reached a safe point: the state is saved and the same command goes on."""


def choose(table, name: str, what: str):
    """table[name], or the name itself where the table is a tuple of names.

    Raises: UserError that lists the names and the nearest one."""
    if name not in table:
        close = difflib.get_close_matches(str(name), list(table), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        known = ", ".join(table) if len(table) < 50 else f"{len(table):,} names"
        raise UserError(f"unknown {what} {name!r}{hint} (known: {known})")
    return table[name] if isinstance(table, dict) else name


def fold(*key) -> int:
    """63-bit seed, a function of the key alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(),
                          "little") >> 1


def rng(*key, device="cpu") -> torch.Generator:
    """Generator whose stream is a function of the key alone."""
    return torch.Generator(device).manual_seed(fold(*key))


@contextlib.contextmanager
def seeded(*key):
    """Context in which the global CPU generator is a function of the key, and is put back after:
    for what of torchvision draws from it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(fold(*key))  # torch.manual_seed moves GPUs' as well
        yield


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def pick_device() -> torch.device:
    """This process's accelerator, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def any_rank(flag: bool) -> bool:
    """Whether any process raised its flag; returns when every process is here."""
    t = torch.tensor(float(flag), device=pick_device())
    if world()[1] > 1:
        dist.all_reduce(t)
    return bool(t)


def say(text: str) -> None:
    """Prints a line on the first process only."""
    if world()[0] == 0:
        (tqdm.write if sys.stderr.isatty() else print)(text)
        sys.stdout.flush()


class Progress(tqdm):
    """tqdm in images, on the first process; where there is no terminal, a line each 8 s."""

    def __init__(self, total: int, what: str, start: int = 0):
        super().__init__(total=total, initial=start, desc=what, leave=False, unit=" images",
                         miniters=1, mininterval=0.2 if sys.stderr.isatty() else 8,
                         disable=world()[0] != 0)

    def display(self, msg=None, pos=None):
        if sys.stderr.isatty():
            return super().display(msg, pos)
        if self.n > self.initial:
            print(self, flush=True)


def write_atomically(path: Path, content: bytes | str | Callable) -> None:
    """Writes the file whole or not at all: a reader never sees half of it, and a full disk leaves
    the old one.  content: what to write, or a function that writes to an open binary file."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"cannot write {path}: {' '.join(str(e).split())}") from None


def read_lines(path: Path | str, key: str) -> list[str]:
    """The lines of a text file that are not empty.  Raises: UserError that names the key."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{key}: cannot read {path} ({e}): expected a text file") from None
    return [line.strip() for line in lines if line.strip()]


def sha(*parts) -> str:
    """First 16 hex digits of the SHA-256 of all parts: text, bytes, the file of a Path, tensors by
    name.  Raises: OSError."""
    h = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                part = hashlib.file_digest(file, "sha256").digest()
        elif isinstance(part, dict):
            part = sha(*itertools.chain.from_iterable(sorted(part.items())))
        elif isinstance(part, Tensor):
            part = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        h.update(part.encode() if isinstance(part, str) else part)
    return h.hexdigest()[:16]


def pictures_below(top: Path) -> list[Path]:
    """The picture files below a folder (none if it is absent), sorted, without hidden ones; linked
    folders are entered.  Raises: OSError, also on a loop of links."""
    if not top.is_dir():
        return []
    kinds = torchvision.datasets.folder.IMG_EXTENSIONS
    entries = [e for e in sorted(os.scandir(top), key=lambda e: e.name) if e.name[0] != "."]
    found = [Path(e) for e in entries if e.name.lower().endswith(kinds) and e.is_file()]
    for folder in (Path(e) for e in entries if e.is_dir()):
        found += pictures_below(folder)
    return found


def read_picture(path: Path | str, border_px: int = 0) -> Image.Image:
    """The picture in RGB, border_px cut off on each side; 16-bit grey is scaled to 8 bit (`convert`
    would clip it to white).  Raises: UserError."""
    try:
        with Image.open(path) as im:
            if im.mode[0] in "IF":
                grey = np.asarray(im)
                if im.mode == "F" or grey.min() < 0 or not 255 < grey.max() <= 65535:
                    raise ValueError(f"mode {im.mode} has no known range: save it with 8 or 16 bit")
                im = Image.fromarray((grey / 257 + 0.5).astype(np.uint8))
            im = im.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UserError(f"cannot read the image {path} ({e}): mend or remove it") from None
    return ImageOps.crop(im, border_px) if border_px else im


@functools.cache
def versions() -> dict[str, str]:
    """Versions that a result depends on: this file (once: it may be edited during a long run),
    Python and the packages."""
    return {"erpm": sha(Path(__file__)), "python": platform.python_version(),
            "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": np.__version__}


# ==== 2. CONFIG ====
# The frozen dataclasses are schema, default, type, range and help.  config.yaml holds recipes:
# what differs from the defaults.  Precedence: default < recipe (or the run's file) < key=value.


def opt(default, text: str, *valid):
    """Dataclass field: default, help text and what is valid, (least, most) or a choice of words."""
    return dataclasses.field(default=default, metadata={"help": text, "valid": valid})


MANY = 10 ** 9


@dataclass(frozen=True)
class Data:
    """The training set, and how pictures become squares."""
    name: str = opt("shapes", "training set, one of `python erpm.py sets`, or folder:PATH")
    root: str = opt("data", "folder that holds the data sets")
    size_px: int = opt(0, "side of the square images that networks see; 0 = their own", 0, 512)
    fit: str = opt("", "crop = the centre is cut out; squash = nothing is cut off; empty = as the "
                       "network wants it", "", "crop", "squash")
    crop: bool = opt(True, "training: random crops (stored images: shifts by up to 1/8)")
    flip: bool = opt(True, "training: mirror half of the images; wrong for digits and letters")
    names: str = opt("", "file of class names for prompts, in label order; empty = the set's own")
    n_train: int = opt(0, "training images used at most (drawn by seed 0); 0 = all", 0, MANY)
    n_test: int = opt(0, "images used at most of each scored set (likewise); 0 = all", 0, MANY)
    allow_partial: bool = opt(False, "score a set whose number of images is not the published one")
    workers: int = opt(0, "loader processes; images decoded from files want 4 or more", 0, 256)


@dataclass(frozen=True)
class Model:
    """The two networks.  A name with a pretrained tag (timm:resnet50.tv_in1k) loads its weights."""
    student: str = opt("cifar:resnet14-w2-s2", "the large network M of [A]")
    student_weights: str = opt("", "file that it starts from; empty = by tag, or made by pretrain")
    teacher: str = opt("cifar:resnet14-s2", "the small network M_t of [A]")
    teacher_weights: str = opt("", "file that it starts from; empty = by tag, or random")
    head: str = opt("linear", "text = zero-shot, prompts classify (open_clip:)", "linear", "text")
    templates: str = opt("", "file of prompt templates, a line each with {} for the class")


@dataclass(frozen=True)
class Train:
    """One training stage."""
    epochs: float = opt(8.0, "passes over the stage's images", 1e-3, 1e5)
    n_images: int = opt(0, "training images of this stage at most; 0 = all", 0, MANY)
    batch: int = opt(128, "images a step, over all processes", 1, 10 ** 6)
    accum: int = opt(1, "micro-batches that a step is made of", 1, 10 ** 4)
    optimizer: str = opt("adamw", "sgd has momentum 0.9, Nesterov", "adamw", "sgd")
    lr: float = opt(3e-3, "peak learning rate; cosine to zero", 1e-9, 100)
    weight_decay: float = opt(0.05, "decoupled for adamw; none on biases and norms", 0, 10)
    warmup: float = opt(0.5, "epochs of linear warm-up", 0, 1e5)
    clip: float = opt(1.0, "largest gradient norm; 0 = off", 0, 1e6)
    ema: float = opt(0.0, "decay of the averaged weights that are kept; 0 = off", 0, 0.999999)
    smoothing: float = opt(0.0, "label smoothing", 0, 0.9)


@dataclass(frozen=True)
class Pretrain(Train):
    """How the student learns clean data, where its name has no pretrained weights for them."""
    tune: int = opt(-1, "last stages that are trained; -1 = all, 0 = linear probe", -1, 1000)


@dataclass(frozen=True)
class Robustify(Train):
    """How the small teacher is made robust; its augmentation also makes x~ for distill."""
    method: str = opt("augment", "augment = on augmented images; kd, dad = distilled as [B]; "
                                 "none = robust as it comes", "augment", "none", "kd", "dad")
    augment: str = opt("pixmix+augmix", "augmentations, joined by +")
    severity: float = opt(3.0, "strength of augmix; its authors: 1 on ImageNet, 3 on CIFAR", .1, 10)
    pictures: str = opt("", "pixmix: folder of pictures to mix in; empty = made here")
    clean: bool = opt(True, "train on x beside x~; without, twice the epochs cost the same")
    jsd: float = opt(0.0, "weight of AugMix's consistency loss (there 12); 0 = off", 0, 1000)
    teacher: str = opt("", "kd, dad: the network to learn from, open_clip: by prompts; without "
                           "weights it is trained first; empty = model.student")
    teacher_weights: str = opt("", "file that it starts from; empty = by tag")
    temperature: float = opt(4.0, "kd, dad: softmax temperature", 0.01, 100)
    radius: float = opt(0.1, "dad: L2 norm of what is added to an image in [0, 1]", 0, 1000)
    step: float = opt(0.1, "dad: L2 norm of an ascent step", 0, 1000)
    steps: int = opt(1, "dad: ascent steps", 0, 1000)
    start: float = opt(0.8, "dad: probability of a random start", 0, 1)
    through: bool = opt(False, "dad: the gradient crosses the quantiser, straight through")
    samples: str = opt("", "dad: folder (in the run's) of samples; empty = new every epoch")


@dataclass(frozen=True)
class Vqgan(Train):
    """The VQGAN of robustify.method=dad, and how it is trained where it has no weights."""
    name: str = opt("tiny_f2_256", "one of VQGANS, or a YAML file of taming-transformers")
    weights: str = opt("", "file of its weights; empty = trained on the images first")


@dataclass(frozen=True)
class Distill(Train):
    """How the large network is tuned.  tune = last stages tuned, head = of these, own a head."""
    method: str = opt("erpm", "erpm = [A]; team = original, robust tail, teacher; apt = a tail "
                              "alone; lp = the Linear; ft = all; lp-ft; wise = between original "
                              "and ft; vpt = a ViT's prompts; none = (compare) the teacher alone",
                      "none", "erpm", "team", "apt", "lp", "ft", "lp-ft", "wise", "vpt")
    tune: int = opt(3, "last stages that are tuned", 0, 1000)
    head: int = opt(3, "of these, the last ones that each head has for itself", 0, 1000)
    dropout: float = opt(0.1, "rate in the tuned part and before classifiers", 1e-3, 0.99)
    norms: str = opt("frozen", "tuned BatchNorm: own = of each head's images", "frozen", "own")
    dropout_in: str = opt("tail", "head = before the classifiers alone", "tail", "head")
    alpha: float = opt(0.5, "weight of the distillation loss; 0 = no distillation", 0, 1)
    temperature: float = opt(2.0, "softmax temperature of the distillation", 0.01, 100)
    wise: float = opt(0.5, "wise: share of the fine-tuned weights", 0, 1)
    views: int = opt(0, "augmented views whose features are kept on disk; 0 = off", 0, 10000)
    prompts: int = opt(10, "vpt: prompt tokens", 0, 1000)
    deep: bool = opt(True, "vpt: new tokens before every block, else before the first")


@dataclass(frozen=True)
class Compare:
    """What `compare` and `demo` run."""
    seeds: int = opt(1, "seeds 0, 1, ... of every run", 1, 1000)
    rows: str = opt("", "a line a run, LABEL: KEY=VALUE ...; without settings it is the recipe's "
                        "own, or that of the label above.  '# TITLE; NOTE' begins a table")

    @property
    def plan(self) -> tuple[dict[str, list[str]], dict[str, dict[str, str]]]:
        """({"title; note": labels}, {label: {"section.key": text}})."""
        tables, runs, title = {}, {}, "Methods"
        for line in filter(None, map(str.strip, self.rows.splitlines())):
            label, colon, words = line.partition(":")
            if line.startswith("#"):
                title = line.strip("# ")
            elif not colon:
                raise UserError(f"compare.rows: {line!r} is not of the form LABEL: KEY=VALUE ...")
            else:
                runs[label] = dict(w.partition("=")[::2] for w in words.split()) \
                    or runs.get(label, {})
                tables.setdefault(title, []).append(label)
        return tables, runs or {"": {}}


@dataclass(frozen=True)
class Eval:
    """What is scored and how."""
    sets: str = opt("", "sets, joined by commas, or all (that are found); LABEL@folder:PATH too; "
                        "empty = the training set, its -c and its -r")
    models: str = opt("", "networks instead of a run, joined by commas: names with a tag, "
                          "NAME=WEIGHTS_FILE, run:FOLDER, each also with LABEL@ before it")
    head: str = opt("auto", "auto = its own on its own classes, else prompts or linear probe; "
                            "own = its outputs are the set's, you say so", "auto", "own", "probe")
    rule: str = opt("product", "selection rule of the headline figure; all rules are recorded")
    passes: int = opt(10, "dropout passes; 0 = closed form", 0, 1000)
    n_cell: int = opt(0, "images at most of each cell of a generated -c set; 0 = all", 0, MANY)
    batch: int = opt(256, "images a forward", 1, 10 ** 6)


@dataclass(frozen=True)
class Runtime:
    """What changes speed and safety, not meaning."""
    amp: str = opt("auto", "autocast type of networks", "auto", "bf16", "fp16", "none")
    log_every: int = opt(20, "steps between lines of log.jsonl", 1, MANY)
    save_every: int = opt(200, "steps between checkpoints", 1, MANY)


@dataclass(frozen=True)
class Config:
    """Everything.  `python erpm.py COMMAND section.key=value ...` changes it."""
    recipe: str = opt("", "recipe of config.yaml; empty = the defaults, for demo its own")
    run: str = opt("", "name of the run; empty = recipe or data set, seed if not 0")
    out: str = opt("runs", "folder of the runs")
    seed: int = opt(0, "seed of everything but the cuts of the data", 0, 2 ** 31)
    data: Data = Data()
    model: Model = Model()
    pretrain: Pretrain = Pretrain()
    robustify: Robustify = Robustify()
    vqgan: Vqgan = Vqgan()
    distill: Distill = Distill()
    compare: Compare = Compare()
    eval: Eval = Eval()
    runtime: Runtime = Runtime()

    @property
    def dir(self) -> Path:
        return Path(self.out) / self.run


PARTS = {f.name: f.default for f in dataclasses.fields(Config)
         if dataclasses.is_dataclass(f.default)}
FIELDS = {f.name: f for f in dataclasses.fields(Config) if f.name not in PARTS} | {
    f"{name}.{f.name}": f for name, part in PARTS.items() for f in dataclasses.fields(part)}


RECIPE_FILE = Path(__file__).with_name("config.yaml")


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key that stands twice (plain YAML keeps the last silently)."""

    def construct_mapping(self, node, deep=False):
        keys = [k.value for k, _ in node.value]
        twice = [k for k in keys if keys.count(k) > 1]
        if twice:
            raise UserError(f"line {node.start_mark.line + 1}: {twice[0]!r} stands twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """The file's mapping.  Raises: UserError, also where a first line "# sha256 ..." is wrong."""
    try:
        text = path.read_text()
        tree = yaml.load(text, _Loader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    seal, _, rest = text.partition("\n")
    if seal.startswith("# sha256 ") and seal != f"# sha256 {sha(rest)}":
        raise UserError(f"{path} is damaged or was edited: give KEY=VALUE instead, or delete its "
                        "first line where the settings are right")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping at the top, got {type(tree).__name__}")
    return tree


def typed(value, path: str, where: str):
    """value as the type of a field and within its range.  Raises: UserError naming path, expected
    and got."""
    field = choose(FIELDS, path, f"setting in {where}:")
    kind, valid, out = field.type, field.metadata["valid"], None
    if kind == "str" and isinstance(value, str):
        return choose(valid or (value,), value, path)
    if kind == "bool" and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind in ("int", "float") and not isinstance(value, bool):
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            out = {"int": int, "float": float}[kind](value)
            if valid[0] <= out <= valid[1] and (out == value or isinstance(value, str)):
                return out
    more = f" of {valid[0]:g} to {valid[1]:g}" if kind in ("int", "float") else (
        " (quote it: YAML reads no, on, 12:30 as other types)" if kind == "str" else "")
    raise UserError(f"{where}: {path}: expected {kind}{more}, got {value!r}")


def check(cfg: Config, processes: int = 1) -> None:
    """Raises: UserError where values that are valid by themselves do not go together."""
    for name in ("pretrain", "robustify", "vqgan", "distill"):
        stage = getattr(cfg, name)
        if stage.batch % (stage.accum * processes):
            raise UserError(f"{name}.batch: {stage.batch} images cannot be shared equally by "
                            f"{processes} processes and {name}.accum={stage.accum} micro-batches")
    if cfg.distill.head > cfg.distill.tune:
        raise UserError(f"distill.head: expected 0 to distill.tune = {cfg.distill.tune}, got "
                        f"{cfg.distill.head}")
    if 0 < cfg.data.size_px < 32:
        raise UserError(f"data.size_px: expected 0 or 32 to 512, got {cfg.data.size_px}")


def changed(cfg: Config, given: dict, where: str = "settings") -> Config:
    """The Config with other values, {"section.key": value} or YAML's {"section": {"key": value}}.

    Raises: UserError."""
    if not isinstance(given, dict):
        raise UserError(f"{where}: expected a mapping of settings, got {given!r}")
    new: dict = {section: {} for section in ("", *PARTS)}
    for path, value in given.items():
        nested = isinstance(value, dict)
        flat = {f"{path}.{k}": v for k, v in value.items()} if nested else {str(path): value}
        for key, v in flat.items():
            section, _, leaf = key.rpartition(".")
            new[section][leaf] = typed(v, key, where)
    parts = {s: dataclasses.replace(getattr(cfg, s), **new[s]) for s in PARTS}
    cfg = dataclasses.replace(cfg, **new[""], **parts)
    check(cfg)
    return cfg


def slug(text: str) -> str:
    """The text as a file's name."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-")


def resolve(words: Sequence[str] = (), recipe: str = "", file: Path = RECIPE_FILE,
            run: Path | None = None) -> Config:
    """The frozen Config: default < recipe of the file (or the run's config.yaml) < words."""
    given = dict(w.partition("=")[::2] for w in words)
    recipe = given.pop("recipe", recipe)
    cfg = Config(recipe=recipe)
    if run:
        cfg = changed(cfg, read_yaml(run / "config.yaml"), str(run / "config.yaml"))
    elif recipe:
        tree = choose(read_yaml(file), recipe, f"recipe in {file}")
        cfg = changed(cfg, tree, f"{file}: {recipe}")
    home = cfg.data.name
    cfg = changed(cfg, given, "command line")
    if not cfg.run:
        names = [cfg.recipe or cfg.data.name]
        names += [cfg.data.name] if cfg.recipe and cfg.data.name != home else []
        names += [f"s{cfg.seed}"] if cfg.seed else []
        cfg = dataclasses.replace(cfg, run=slug("-".join(names)))
    return cfg


def flat(cfg: Config) -> dict:
    """{"section.key": value} of everything."""
    return {path: operator.attrgetter(path)(cfg) for path in FIELDS}


def config_help() -> str:
    """Every key, its default, its meaning and what is valid, a line each."""
    lines = []
    for path, f in FIELDS.items():
        section, dot, key = path.partition(".")
        if dot and f is dataclasses.fields(PARTS[section])[0]:
            lines += ["", f"{section}: {PARTS[section].__doc__}"]
        valid = (" | " if f.type == "str" else " to ").join(map(str, f.metadata["valid"]))
        lines.append(f"  {f'{path}={f.default}':<42} {f.metadata['help']}"
                     + (f"  [{valid.strip(' |')}]" if valid else ""))
    return "\n".join(lines)


# ==== 3. CORRUPTIONS ====
# ImageNet-C's 15 corruptions as batched tensor code: uint8 (B,3,H,W) in and out, on the device of
# the images. Randomness is a function of (seed, image index, name, severity), not of the batch.
# Each takes x, its constants c of one severity, and gens, a generator for each image.


SMALL_PX = 64  # images whose longer side is at most this get CIFAR-10-C's constants


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


def gaussian_noise(x, c, gens):
    """x + noise of standard deviation c."""
    return truncate(draw(gens, x.shape[1:], torch.Tensor.normal_).mul_(255 * c).add_(x))


@functools.lru_cache(maxsize=8)
def poisson_table(photons, device, levels=4096):
    """uint8 (256 * levels,): row v holds the noisy values of pixel value v at even quantiles."""
    n = torch.arange(photons + 1, dtype=torch.float64)  # counts above white are clipped anyway
    rate = torch.arange(256, dtype=torch.float64)[:, None] * (photons / 255)
    quantiles = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    below = torch.special.gammaincc(n + 1, rate)  # P(count <= n)
    counts = torch.searchsorted(below, quantiles.expand(256, -1).contiguous())
    return truncate(counts.clamp_(max=photons) * (255 / photons)).flatten().to(device)


def shot_noise(x, c, gens):
    """Poisson counts with c photons at white: a random quantile, looked up in a table, for
    torch.poisson takes five times as long."""
    key = draw(gens, x.shape[1:], torch.Tensor.random_, 0, 4096, dtype=torch.int32)
    key = key.add_(x.int(), alpha=4096).flatten()
    return poisson_table(c, x.device).index_select(0, key).view(x.shape)


def impulse_noise(x, c, gens):
    """A share c of the elements (not pixels) set to 0 or 255."""
    u = draw(gens, x.shape[1:], torch.Tensor.uniform_)
    return x.masked_fill(u < c, 255).masked_fill_(u < c / 2, 0)


def defocus_blur(x, c, gens):
    """Disk blur, mirrored about the edge pixel; c = radius and sigma of a small Gaussian over the
    disk, which mirrors the kernel at its own edge: at radius 8 and 10 that brightens by 1 %."""
    (h, w), (radius, sigma) = x.shape[-2:], c
    r, size = max(8, radius), 3 if radius <= 8 else 5
    g = torch.arange(-r, r + 1)
    disk = (g[:, None] ** 2 + g ** 2 <= radius ** 2).float()
    disk = v2.functional.gaussian_blur((disk / disk.sum())[None], [size] * 2, [sigma] * 2)
    y = F.pad(x.float(), (16,) * 4, mode="reflect")  # 224 + 2 * 16 = 256: a quick transform
    side, r = y.shape[-2:], r + 16
    spectrum = torch.fft.rfft2(y).mul_(torch.fft.rfft2(disk.to(x.device), s=side))
    return truncate(torch.fft.irfft2(spectrum, s=side)[..., r:r + h, r:r + w])


def gaussian_taps(sigma, radius):
    """Gaussian on -radius..radius with sum 1, a list; sigma 0 is the identity."""
    k = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(sigma, 1e-9)) ** 2)
    return (k / k.sum()).tolist()


def gaussian(x, sigma):
    """Gaussian blur of (B,C,H,W), edge repeated, cut at 4 sigma; a sum of shifted views, which on a
    CPU is several times faster than a convolution."""
    r = int(4 * sigma + 0.5)
    y = F.pad(x.float(), (r, r, r, r), mode="replicate")
    for dim in (3, 2):
        out = torch.zeros_like(y.narrow(dim, 0, x.shape[dim]))
        for i, tap in enumerate(gaussian_taps(sigma, r)):
            out.add_(y.narrow(dim, i, x.shape[dim]), alpha=tap)
        y = out
    return y


def glass_blur(x, c, gens):
    """Gaussian, local shuffle, Gaussian; c = sigma, reach, passes. The shuffle visits the pixels in
    reverse raster order and copies into each the pixel at a random offset (the reference's swap of
    two views is a copy), which may itself be a copy made earlier in the pass. Pointer doubling
    follows such chains, up to 32 links."""
    sigma, d, passes = c
    n, _, h, w = x.shape
    source = here = torch.arange(n * h * w, dtype=torch.int32, device=x.device)
    active = torch.zeros(n, h, w, dtype=torch.int32, device=x.device)
    active[:, d + 1:h - d + 1, d + 1:w - d + 1] = 1  # where the shuffle writes
    active, steps = active.flatten(), torch.arange(-d, d, dtype=torch.int32, device=x.device)
    steps = (steps[:, None] * w + steps).flatten()  # offsets in pixel numbers; never d: as there
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


def motion(x, radius, sigma, angles):
    """(B,C,H,W) smeared along one angle (degrees) an image: a one-sided half Gaussian of 2 radius +
    1 taps at whole-pixel offsets, edge repeated, so the content shifts: as ImageMagick does."""
    (h, w), reach = x.shape[-2:], 2 * radius
    taps = gaussian_taps(sigma, reach)[reach:]
    padded = F.pad(x.float(), (reach,) * 4, mode="replicate")
    out = torch.zeros_like(x, dtype=torch.float32)
    for p, o, angle in zip(padded, out, angles):
        dy, dx = math.sin(math.radians(angle)), math.cos(math.radians(angle))
        for i, tap in enumerate(taps):
            top, left = (reach + math.ceil(i * d - 0.5) for d in (dy, dx))
            o.add_(p[:, top:top + h, left:left + w], alpha=tap / sum(taps))
    return out


def motion_blur(x, c, gens):
    """Smear along an angle within 45 degrees of the horizontal, c = radius and sigma."""
    return truncate(motion(x, *c, draw(gens, (), torch.Tensor.uniform_, -45, 45).tolist()))


def enlarge(x, zoom, h, w):
    """(...,h,w): the centre of x, enlarged with aligned corners to round(side * zoom), trimmed."""
    size = [round(n * zoom) for n in x.shape[-2:]]
    y = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    return y[..., (size[0] - h) // 2:, (size[1] - w) // 2:][..., :h, :w]


def zoom_blur(x, c, gens):
    """Mean of the image and of its centre enlarged by each factor, c = end and step of the factors
    (the image itself counts twice: as factor 1 as well)."""
    (h, w), y, factors = x.shape[-2:], x.float(), np.arange(1, *c)
    total = y.clone()
    for zoom in factors:
        rows, columns = math.ceil(h / zoom), math.ceil(w / zoom)
        top, left = (h - rows) // 2, (w - columns) // 2
        total += enlarge(y[..., top:top + rows, left:left + columns], zoom, h, w)
    return truncate(total / (len(factors) + 1))


def snow(x, c, gens):
    """Whitened image + flakes (thresholded noise, enlarged, smeared) + the flakes turned around."""
    mean, std, zoom, threshold, radius, sigma, keep = c
    h, w = x.shape[-2:]
    crop = (1, math.ceil(h / zoom), math.ceil(w / zoom))
    flakes = enlarge(draw(gens, crop, torch.Tensor.normal_, mean, std), zoom, h, w)
    flakes = truncate(flakes * (flakes >= threshold) * 255)  # 8 bits before and after the smear
    angles = draw(gens, (), torch.Tensor.uniform_, -135, -45).tolist()
    flakes = truncate(motion(flakes, radius, sigma, angles)).float()
    y = x.float()
    white = (y[:, :1] * 0.299).add_(y[:, 1:2], alpha=0.587).add_(y[:, 2:], alpha=0.114)
    white = torch.maximum(y, white.mul_(1.5).add_(127.5)).mul_(1 - keep)
    return truncate(white.add_(y, alpha=keep).add_(flakes + flakes.flip(-2, -1)))


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


ICE_FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")  # not the sixth
ICE = ((.305, .585, .650, .07), (.787, .805, .841, .08), (.787, .805, .841, .08),
       (.540, .599, .648, .10), (.441, .484, .528, .14))  # mean RGB, deviation within 224 px


def frost_folder(folder=None):
    """The folder of the original textures: `folder`, or a PyPI package's, or None."""
    specs = [importlib.util.find_spec(p) for p in ("imagecorruptions", "imagenet_c")]  # no import
    folders = [Path(s.origin).parent / "frost" for s in specs if s and s.origin]
    return folder or next((f for f in folders if all((f / n).is_file() for n in ICE_FILES)), None)


def frost_source(folder=None):
    """"original" or "procedural": the textures that frost draws from."""
    return "original" if frost_folder(folder) else "procedural"


@functools.lru_cache(maxsize=32)
def frost_textures(folder, h, w, device):
    """The five textures, uint8 (3,H,W), or tinted plasma where their files are not to be had;
    a fifth of it for small images, more where that would hardly cover one."""
    folder, textures = frost_folder(folder), []
    for i, (*tint, deviation) in enumerate(ICE):
        if folder:
            with Image.open(Path(folder) / ICE_FILES[i]) as file:
                ice = v2.functional.pil_to_tensor(file.convert("RGB"))
        else:
            ice = plasma([rng("ice", i)], 256, 1.04).repeat(1, 2, 2)
            ice = (ice - ice.mean()) * (deviation / ice.std()) + torch.tensor(tint).view(3, 1, 1)
            ice = truncate(ice * 255)
        least = 1.1 * max(h / ice.shape[1], w / ice.shape[2])
        scale = max(least, 0.2 if max(h, w) <= SMALL_PX else 1)
        size = [round(n * scale) for n in ice.shape[1:]]
        textures.append(v2.functional.resize(ice, size, antialias=False).to(device))
    return textures


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


def fog(x, c, gens):
    """Image + c0 * plasma, scaled back by the image's own maximum."""
    h, w = x.shape[-2:]
    peak = x.amax((1, 2, 3)).float()[:, None, None, None]
    y = plasma(gens, 1 << (max(h, w) - 1).bit_length(), c[1])[:, None, :h, :w]
    return truncate((y * (255 * c[0]) + x).mul_(peak / (peak + 255 * c[0])))


def brightness(x, c, gens):
    """V + c in HSV: at fixed hue and saturation all channels scale with V; black turns grey."""
    y = x.float()
    v = y.amax(1, keepdim=True)
    new = (v + 255 * c).clamp_(max=255)
    return truncate(torch.where(v == 0, new, y.mul_(new / v)))


def contrast(x, c, gens):
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


def remap(x, points, corners):
    """Bilinear x (B,C,H,W) at points (B,2,H,W), columns and rows in pixels, mirrored about the
    centre of the edge pixel (corners) or about its outer edge."""
    size = points.new_tensor(x.shape[:1:-1])
    scale, start = (2 / (size - 1), -1) if corners else (2 / size, 1 / size - 1)
    grid = points.permute(0, 2, 3, 1) * scale + start
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=corners)


def affine(h, w, shift):
    """(B,2,3) float32, from output to input pixels: the map that moves three points around the
    centre by shift (B,3,2) pixels."""
    s, signs = min(h, w) // 3, ((1, 1), (1, -1), (-1, -1))
    points = [[h // 2 + i * s, w // 2 + j * s, 1] for i, j in signs]  # the reference has h with x
    points = torch.tensor(points).double()
    moved = points + F.pad(shift.cpu().double(), (0, 1))
    return torch.linalg.solve(moved, points.expand_as(moved)).mT[:, :2].float()


def elastic_transform(x, c, gens):
    """A random affine map (mirrored at the edge pixel), then a smooth random field (mirrored at
    the edge); c = amplitude, sigma and jitter in shares of the side."""
    h, w = x.shape[-2:]
    side = min(h, w) * (1 if max(h, w) <= SMALL_PX else 244 / 224)  # 244: the reference's slip
    amplitude, sigma, jitter = (side * k for k in c)
    shift = draw(gens, (3, 2), torch.Tensor.uniform_, -jitter, jitter)
    a, b, offset = affine(h, w, shift).to(x.device)[..., None, None].unbind(2)  # (B,2,1,1) each
    u, v = torch.arange(w, device=x.device), torch.arange(h, device=x.device)[:, None]
    y = remap(x.float(), a * u + b * v + offset, True)
    if amplitude:
        field = draw(gens, (2, h, w), torch.Tensor.uniform_, -amplitude, amplitude)
        rows, columns = blur_matrix(h, sigma, x.device), blur_matrix(w, sigma, x.device)
        for f in field:  # one by one, or the matrix product rounds by the size of the batch
            f.copy_(rows @ f @ columns.T)
        y = remap(y, field.add_(torch.stack(torch.broadcast_tensors(u, v))), False)
    return truncate(y)


def by_pillow(x, edit):
    """uint8 (B,3,H,W): x with `edit` done to each image as a Pillow image."""
    done = bytearray()
    for planes in x.cpu().numpy():  # plane by plane: far cheaper than to permute the axes
        image = edit(Image.merge("RGB", [Image.fromarray(plane) for plane in planes]))
        for band in "RGB":
            done += image.tobytes("raw", band)
    return torch.frombuffer(done, dtype=torch.uint8).view(len(x), 3, image.height, image.width)


def pixelate(x, c, gens):
    """Pillow's box reduction to a share c of the side, and its box enlargement."""
    h, w = x.shape[-2:]
    m, n = int(h * c), int(w * c)
    few = by_pillow(x, lambda image: image.resize((n, m), Image.BOX)).numpy()
    rows, columns = (((np.arange(a) + 0.5) * (b / a)).astype(int) for a, b in ((h, m), (w, n)))
    return torch.from_numpy(few.take(columns, 3).take(rows, 2)).to(x.device)


def jpeg_compression(x, c, gens=()):
    """JPEG at quality c, chroma 4:2:0, by Pillow."""
    def edit(image):
        image.save(file := io.BytesIO(), "JPEG", quality=c)
        return Image.open(file)
    return by_pillow(x, edit).to(x.device)


RECIPES = {  # name: function; c of severities 1 to 5 in make_imagenet_c.py; in make_cifar_c.py
    "gaussian_noise": (gaussian_noise, (.08, .12, .18, .26, .38), (.04, .06, .08, .09, .1)),
    "shot_noise": (shot_noise, (60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (.03, .06, .09, .17, .27), (.01, .02, .03, .05, .07)),
    "defocus_blur": (defocus_blur, ((3, .1), (4, .5), (6, .5), (8, .5), (10, .5)),
                     ((.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1))),
    "glass_blur": (glass_blur, ((.7, 1, 2), (.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
                   ((.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2))),
    "motion_blur": (motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
                    ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (zoom_blur, ((1.11, .01), (1.16, .01), (1.21, .02), (1.26, .02), (1.31, .03)),
                  ((1.06, .01), (1.11, .01), (1.16, .01), (1.21, .01), (1.26, .01))),
    "snow": (snow, ((.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7),
                    (.55, .3, 4, .9, 12, 8, .7), (.55, .3, 4.5, .85, 12, 8, .65),
                    (.55, .3, 2.5, .85, 12, 12, .55)),
             ((.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9),
              (.15, .3, 1.75, .55, 10, 4, .9), (.25, .3, 2.25, .6, 12, 6, .85),
              (.3, .3, 1.25, .65, 14, 12, .8))),
    "frost": (frost, ((1, .4), (.8, .6), (.7, .7), (.65, .7), (.6, .75)),
              ((1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45))),
    "fog": (fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
            ((.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, (.1, .2, .3, .4, .5), (.05, .1, .15, .2, .3)),
    "contrast": (contrast, (.4, .3, .2, .1, .05), (.75, .5, .4, .3, .15)),
    "elastic_transform": (elastic_transform, ((2, .7, .1), (2, .08, .2), (.05, .01, .02),
                                              (.07, .01, .02), (.12, .01, .02)),
                          ((0, 0, .08), (.05, .2, .07), (.08, .06, .06), (.1, .04, .05),
                           (.1, .03, .03))),
    "pixelate": (pixelate, (.6, .5, .4, .3, .25), (.95, .9, .85, .75, .65)),
    "jpeg_compression": (jpeg_compression, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
}
CORRUPTIONS = tuple(RECIPES)


def corrupt(x, name, severity, seed=0, index=None, jpeg=False, frost_dir=None):
    """x corrupted, uint8 (B,3,H,W) on x's device: a function of (x, index, seed, name, severity).

    index: B ints, the identities of the images, by default 0..B-1. jpeg: the round trip at quality
    85 that the published files went through. frost_dir: folder of the original textures. Sides
    of 32 to 512 px. Constants: make_cifar_c.py's up to 64 px (longer side), make_imagenet_c.py's
    above. A GPU draws other numbers.
    Paper: Hendrycks and Dietterich, ICLR 2019. Raises: UserError for any other input."""
    function, *columns = choose(RECIPES, str(name), "corruption")
    came = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
    fits = re.fullmatch(r"torch.uint8 \(\d+, 3, (\d+), (\d+)\)", came)
    if not fits or not all(32 <= int(side) <= 512 for side in fits.groups()):
        raise UserError(
            f"expected images as a uint8 tensor (B,3,H,W), sides of 32 to 512 px, got {came}")
    if severity not in (1, 2, 3, 4, 5):
        raise UserError(f"severity must be 1, 2, 3, 4 or 5, got {severity!r}")
    index = range(len(x)) if index is None else [int(k) for k in index]
    if len(index) != len(x):
        raise UserError(f"{len(x)} images but {len(index)} indices")
    (h, w), severity = x.shape[-2:], int(severity)
    if frost_dir and name == "frost":
        function = functools.partial(frost, folder=frost_dir)
    c, out = columns[max(h, w) <= SMALL_PX][severity - 1], torch.empty_like(x)
    n = max(1, 2 ** 19 // (3 * h * w)) if x.device.type == "cpu" else len(x)  # stays in the cache
    for i in range(0, len(x), n):
        gens = [rng("corrupt", int(seed), k, name, severity, device=x.device)
                for k in index[i:i + n]]
        y = function(x[i:i + n].contiguous(), c, gens)
        out[i:i + n] = jpeg_compression(y, 85) if jpeg else y
    return out


# ==== 4. AUGMENTATIONS ====
# In: uint8 (B,3,H,W) on any device, a torch.Generator. Out: uint8 (B,3,H,W), drawn anew for each
# image. Always: a function of (x, generator state), and the global generator stays as it was.
# A CPU generator gives the same draws whatever the device of x, and never waits for a GPU.

PIXELS = ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4))  # ImageNet's mean and deviation, 0..255


def _key(generator):
    """An int drawn from the generator: the seed of what draws by NumPy or torchvision."""
    return torch.randint(2**62, (), generator=generator, device=generator.device).item()


def _column(v, x, dtype=torch.float32):
    """NumPy v (N,) as a tensor (N,1,1,1) on the device of x."""
    return torch.from_numpy(v).to(x.device, dtype).view(-1, 1, 1, 1)


def _bytes(x):
    """uint8: x in 0..255, rounded and clipped."""
    return truncate(x + 0.5)


def _image_by_image(x, generator, transform):
    """x under a transform of torchvision, which would treat a batch as one image."""
    with seeded(_key(generator)):
        return torch.stack([transform(image) for image in x])


def _chunks(x, size=2**20):
    """Slices of the batch that stay in the cache; on a GPU one slice."""
    n = max(1, size // x[0].numel()) if x.device.type == "cpu" else len(x)
    return [slice(i, i + n) for i in range(0, len(x), n)]


# The nine operations of AugMix, within a grey level of PIL's but for the borders of what moves;
# each takes x and a level (N,), NumPy float64, negative for the other way.


def autocontrast(x, level):
    """x stretched per channel so that its darkest value is 0 and its brightest 255."""
    low, high = (f(x, (2, 3), keepdim=True).float() for f in (torch.amin, torch.amax))
    flat = low == high
    scale = (255 / (high - low)).masked_fill_(flat, 1)
    return truncate(x.float().sub_(low.masked_fill_(flat, 0)).mul_(scale))


def equalize(x, level):
    """x with a flat histogram per channel, by PIL's integer rule: one table a plane."""
    planes, same = x.flatten(2).flatten(0, 1), torch.arange(256, device=x.device)
    first = torch.arange(len(planes), dtype=torch.int32, device=x.device)[:, None] * 256
    index = (planes + first).flatten()
    counts = index.bincount(minlength=256 * len(planes)).view(-1, 256)
    below = counts.cumsum(1) - counts
    step = below.gather(1, planes.amax(1, keepdim=True).long()) // 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, same).to(torch.uint8)
    return table.flatten().index_select(0, index).view(x.shape)


def posterize(x, level):
    """x with its upper 4 - int(0.4 level) bits kept."""
    return x & _column(256 - (16 << (level * 4 / 10).astype(int)), x, torch.uint8)


def solarize(x, level):
    """x with the values from 256 - int(25.6 level) on inverted."""
    over = _column(255 - (level * 256 / 10).astype(int), x, torch.int16) - x  # < 0 where inverted
    return x ^ over.bitwise_right_shift_(15).to(torch.uint8)  # a comparison is several times slower


def rotate(x, level):
    """x turned by int(3 level) degrees about its centre: bilinear, 0 outside."""
    h, w = x.shape[2:]
    turn = torch.from_numpy(np.deg2rad((level * 3).astype(int))).float()[:, None]
    cos, sin = turn.cos(), turn.sin()
    u, v = torch.arange(w) + 0.5 - w / 2, torch.arange(h) + 0.5 - h / 2
    columns = torch.stack([cos * u / w, sin * u / h], 1)[:, :, None] * 2  # (N,2,1,W)
    rows = torch.stack([-sin * v / w, cos * v / h], 1)[..., None] * 2  # (N,2,H,1)
    grid = (columns.to(x.device) + rows.to(x.device)).permute(0, 2, 3, 1)
    return truncate(F.grid_sample(x.float(), grid, align_corners=False))


def _take(views, *index):
    """views[index] for NumPy index arrays."""
    if views.device.type == "cpu":  # NumPy copies whole runs, 5 times faster than torch
        return torch.from_numpy(views.numpy()[index])
    return views[tuple(torch.from_numpy(i).to(views.device) for i in index)]


def _slide(x, shift):
    """x with row r of image n moved left by shift (N,H or 1) columns: bilinear, 0 outside."""
    n, c, h, w = x.shape
    shift = np.clip(shift, -w, w)
    left = np.floor(shift).astype(int)
    p = np.abs(left).max() + 1
    views = F.pad(x, (p, p)).unfold(3, w, 1)  # (N,3,H,2p+1,W): a row from every start
    at = np.arange(n)[:, None, None], np.arange(c)[:, None], np.arange(h), left[:, None] + p
    near = _take(views, *at)
    if (left == shift).all():
        return near
    far = _take(views, *at[:3], at[3] + 1).float()
    return truncate(near.float().lerp_(far, _column(shift - left, x).view(n, 1, h, 1)))


def shear_x(x, level):
    """x with row r moved left by 0.03 level (r + 1/2) columns."""
    return _slide(x, 0.03 * level[:, None] * (np.arange(x.shape[2]) + 0.5))


def translate_x(x, level):
    """x moved left by int(level W / 30) columns."""
    return _slide(x, (level * x.shape[3] / 30).astype(int)[:, None])


def shear_y(x, level):
    """x with column c moved up by 0.03 level (c + 1/2) rows."""
    return shear_x(x.mT, level).mT.contiguous()


def translate_y(x, level):
    """x moved up by int(level H / 30) rows: each plane as one long row."""
    step = (level * x.shape[2] / 30).astype(int)[:, None]
    return _slide(x.flatten(2)[:, :, None], step * x.shape[3]).view(x.shape)


GEOMETRIC_OPS = (rotate, shear_x, shear_y, translate_x, translate_y)
OPS = GEOMETRIC_OPS + (autocontrast, equalize, posterize, solarize)  # the rest is in ImageNet-C


def _draw_ops(random, severity, *shape):
    """Op numbers and levels, NumPy of the given shape; half of the geometric levels negative."""
    op, level = random.integers(len(OPS), size=shape), random.uniform(0.1, severity, shape)
    turned = (op < len(GEOMETRIC_OPS)) & (random.random(shape) < 0.5)
    return op, np.where(turned, -level, level)


def _do_ops(images, op, level):
    """A list: images with OPS[op[i]] at level[i] done to image i; op -1 leaves it alone."""
    images = list(images)
    for k, f in enumerate(OPS):
        at = np.flatnonzero(op == k).tolist()
        if at:
            done = f(torch.stack([images[i] for i in at]), level[at])
            for i, image in zip(at, done):
                images[i] = image
    return images


def _mix_chains(x, weights, op, level):
    """x and its chains op, level (N,width,depth) averaged with weights (N, 1 + width)."""
    n, width, depth = op.shape
    views = [image for image in x for _ in range(width)]
    for t in range(depth):
        views = _do_ops(views, op[..., t].ravel(), level[..., t].ravel())
    mixed = torch.full_like(x, 0.5, dtype=torch.float32)  # so that truncation rounds
    for i, shares in enumerate(weights.tolist()):
        for view, share in zip((x[i], *views[i * width:(i + 1) * width]), shares):
            mixed[i].add_(view, alpha=share)
    return truncate(mixed)


def augmix(x, generator, severity=1, width=3, depth=(1, 3), alpha=1.0):
    """x mixed with `width` chains of depth[0] to depth[1] random operations each.

    Paper: AugMix (Hendrycks et al. 2020): severity 1 for ImageNet, 3 for CIFAR.
    Differs: the mixture is rounded to uint8.
    """
    random, n, (low, high) = np.random.default_rng(_key(generator)), len(x), depth
    # METHOD AugMix: (1 - m) x + m sum_k w_k chain_k(x), w ~ Dirichlet(a), m ~ Beta(a, a)
    w, m = random.dirichlet([alpha] * width, n), random.beta(alpha, alpha, (n, 1))
    weights = np.concatenate([1 - m, m * w], 1)
    steps = random.integers(low, high + 1, (n, width, 1))
    op, level = _draw_ops(random, severity, n, width, high)
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
def clouds(size, n=48):
    """uint8 (n,3,size,size): plasma, a field a channel, a stand-in for PixMix's pictures."""
    side = 1 << (size - 1).bit_length()
    fields = plasma([rng("clouds", i) for i in range(3 * n)], side, 1.3)
    return _bytes(255 * fields.view(n, 3, side, side)[..., :size, :size])


@functools.lru_cache(maxsize=2)
def load_pictures(folder, size, limit=2000):
    """uint8 (M,3,size,size): the first `limit` pictures below a folder, resized and cropped."""
    paths = pictures_below(Path(folder))[:limit]
    if not paths:
        raise UserError(f"pixmix: no picture in {folder}; give a folder of .jpg or .png files")
    fit = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    return torch.stack([fit(read_picture(p)) for p in paths])


def _blend(x, y, a, b, multiply):
    """x and y in [0, 1] added (a x + b y about grey) or multiplied (x^a y^b), clipped."""
    a, b = _column(a, x), _column(b, x)
    if multiply:
        return ((2 * x) ** a * (2 * y).clamp(min=1e-37) ** b / 2).clamp(0, 1)
    return (a * x + b * y + (1 - a - b) / 2).clamp(0, 1)


def pixmix(x, generator, severity=1, k=4, beta=3, pictures=None):
    """x mixed 0 to k times with a picture or with an augmented copy of itself.

    pictures: a folder, or None for clouds made here.
    Paper: PixMix (Hendrycks et al. 2022): beta 3 for CIFAR, 4 in its ImageNet code.
    """
    random, (n, _, h, w) = np.random.default_rng(_key(generator)), x.shape
    size = max(h, w) * 8 // 7
    pool = load_pictures(pictures, size) if pictures else clouds(size)
    crop = random.integers([[len(pool)], [size - h + 1], [size - w + 1]], size=(3, n))
    pictures = [pool[i, :, r:r + h, c:c + w].to(x.device) for i, r, c in crop.T]
    op, level = _draw_ops(random, severity, k + 1, n)
    own, multiply, inner = random.random((3, k + 1, n)) < 0.5
    op, rounds = np.where(own, op, -1), random.integers(k + 1, size=n)
    a, small, b = (random.beta(*ab, (k + 1, n)) for ab in ((beta, 1), (1, beta), (1, beta)))
    a, b = np.where(inner, a, 1 + small), np.where(inner, b, -b)
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
    random = np.random.default_rng(_key(generator))
    draw = lambda *shape: torch.from_numpy(random.uniform(-1, 1, (len(x), *shape)))
    strength = random.uniform(*strength, len(x))
    mean, std = (x.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in PIXELS)
    blocks, out = [], []
    for sizes in random.integers([2, 3], size=(4, 3, 2)).tolist():
        # kernels of 1 or 3 px at dilation 1 to 3
        middle = [(draw(hidden, hidden, 1 + 2 * k, 1 + 2 * k), 1 + d) for k, d in sizes]
        blocks.append([(draw(4 * hidden, 3, 1, 1), 1), *middle, (draw(3, 4 * hidden, 1, 1), 1)])
    for s in _chunks(x, 2**16):
        z = (x[s] - mean) / std
        for kernels in blocks:
            z = z + _column(strength[s], x) * _noise_block(z, [(w[s], d) for w, d in kernels])
        out.append(_bytes(z * std + mean))
    return torch.cat(out)


def cutout(x, generator):
    """x with a square of half its side in grey (the CIFAR-10 setting: 16 of 32 px)."""
    return _image_by_image(x, generator, v2.RandomErasing(1, (0.25, 0.25), (1, 1), 128))


def randaugment(x, generator, num_ops=2, magnitude=9):
    """x under torchvision's RandAugment."""
    return _image_by_image(x, generator, v2.RandAugment(num_ops, magnitude))


def erasing(x, generator):
    """x with a random rectangle in grey in a quarter of the images (Zhong et al. 2020)."""
    return _image_by_image(x, generator, v2.RandomErasing(0.25, value=128))


AUGMENTATIONS = {  # in the order in which a sum applies them
    "none": lambda x, generator: x,
    "deepaugment": deepaugment,
    "pixmix": pixmix,
    "augmix": augmix,
    "randaugment": randaugment,
    "cutout": cutout,
    "erasing": erasing,
}
LABEL_MIXERS = {"mixup": functools.partial(v2.MixUp, alpha=0.8),  # alpha as in [B]
                "cutmix": functools.partial(v2.CutMix, alpha=1.0)}


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

    spec as in augment; with both names the batch draws one, with neither y becomes one-hot.
    """
    names = sorted(spec_names(spec) & set(LABEL_MIXERS))
    if not names:
        return x, F.one_hot(y, n_classes).float()
    with seeded(key := _key(generator)):
        mixer = LABEL_MIXERS[names[key % len(names)]](num_classes=n_classes)
        x, soft = mixer(x.float(), y)
    return _bytes(x), soft


# ==== 5. DATA ====
# In: a set's name.  Out: ImageSet, and batches x uint8 (B,3,H,W), y (B,), index (B,).
# Always: a sample is a function of (seed, epoch, index), the order of (seed, epoch).


@dataclass(frozen=True)
class View:
    """How a picture file becomes a square image to score: the short side resized to size_px /
    crop_pct, the centre cut out; squash = both sides resized, whatever the shape."""
    size_px: int = 224
    crop_pct: float = 0.875
    interpolation: str = "bilinear"
    squash: bool = False

    @property
    def resized(self) -> list[int]:
        return [self.size_px] * 2 if self.squash else [math.floor(self.size_px / self.crop_pct)]

    def __str__(self) -> str:
        how = "both sides" if self.squash else f"short side {self.resized[0]}, centre"
        return f"{how} {self.size_px}, {self.interpolation}"

    def __call__(self, im: Image.Image) -> Image.Image:
        mode = v2.InterpolationMode(self.interpolation)
        im = v2.functional.resize(im, self.resized, interpolation=mode, antialias=True)
        return v2.functional.center_crop(im, self.size_px)


def shift_and_flip(x: Tensor, u: np.ndarray, crop: bool = True, flip: bool = True) -> Tensor:
    """Each image moved by up to 1/8 of its side (edges reflected) and mirrored half of the time.

    Shapes: x uint8 (B,3,S,S), u (B,3) in [0,1)."""
    b, _, s, _ = x.shape
    pad = s // 8 if crop else 0
    at = torch.from_numpy((u[:, :2] * (2 * pad + 1)).astype(np.int64))
    reflect = torch.from_numpy(np.pad(np.arange(s), pad, mode="reflect"))
    rows, cols = (reflect[at[:, i, None] + torch.arange(s)] for i in (0, 1))          # (B,S)
    if flip:
        cols = torch.where(torch.from_numpy(u[:, 2:] < 0.5), cols, cols.flip(1))
    return x[torch.arange(b)[:, None, None], :, rows[:, :, None], cols[:, None, :]] \
        .permute(0, 3, 1, 2).contiguous()


@dataclass(eq=False)
class ImageSet(torch.utils.data.Dataset):
    """Labelled square images, held in memory or read from files.

    base: the set's name; name: what the results call it.  y: labels (n,).
    images: uint8 (n,3,S,S), or paths: files, which `view` makes square after border_px were cut off
    each side (ObjectNet's frame).  own_view: the view is the set's, whatever the network's.
    outputs: the classes of a network that answers here by itself; ids (C,k): which of its outputs
    mean class k, None = all in order.  expected: published number of images, 0 = none.
    corrupted: a -c set; archive: the folder of its published copy.  index: the images in use.
    beside: a copy of each image (samples of [B]), which comes as channels 3 to 5, cut alike.
    draw: (seed, crop, flip) of training, None = as they are scored."""
    base: str
    y: Sequence[int]
    classes: Sequence[str]
    view: View = View()
    images: Tensor | None = None
    paths: Sequence[str] = ()
    name: str = ""
    border_px: int = 0
    own_view: bool = False
    outputs: tuple[str, ...] = ()
    ids: Tensor | None = None
    expected: int = 0
    source: str = ""
    corrupted: bool = False
    archive: Path | None = None
    index: np.ndarray | None = None
    beside: ImageSet | None = None
    draw: tuple[int, bool, bool] | None = None

    def __post_init__(self):
        self.y, self.classes = np.asarray(self.y, np.int64), tuple(self.classes)
        self.name, self.outputs = self.name or self.base, self.outputs or self.classes
        if self.index is None:
            self.index = np.arange(len(self.y))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def transform(self) -> str:
        """What happens to an image before it is scored, as recorded in the results."""
        if self.images is None:
            return (f"cut {self.border_px} px, " if self.border_px else "") + str(self.view)
        stored, size = self.images.shape[-1], self.view.size_px
        return f"stored, {stored} px" + (f", resized to {size} px" if size != stored else "")

    def subset(self, n: int) -> ImageSet:
        """The same set with at most n of its images (0 = all), drawn by a fixed seed: of fewer the
        same ones."""
        if not 0 < n < len(self):
            return self
        order = np.random.default_rng(fold("subset", self.base)).permutation(len(self.y))
        return dataclasses.replace(self, index=np.sort(order[np.isin(order, self.index)][:n]))

    def training(self, seed: int, crop: bool = True, flip: bool = True) -> ImageSet:
        """The same set with random crops and flips, functions of (seed, epoch, index)."""
        return dataclasses.replace(self, draw=(seed, crop, flip))

    def __getitems__(self, keys: Sequence[tuple[int, int]]):
        """Batch (x uint8 (B,3,H,W), y (B,), index (B,)) for keys (epoch, position)."""
        epochs, index = [e for e, _ in keys], self.index[[p for _, p in keys]]
        seed, crop, flip = self.draw or (0, False, False)
        if self.images is None:
            x = torch.stack([self._read(int(i), (seed, "crop", e, int(i)), crop, flip)
                             for e, i in zip(epochs, index)])
        else:
            x = self.images[torch.from_numpy(index)]
            if x.shape[-1] != self.view.size_px:
                x = v2.functional.resize(x, [self.view.size_px] * 2, antialias=True)
            if crop or flip:
                draws = np.random.default_rng(fold(seed, "crop", epochs[0]))
                u = draws.random((len(self.y), 3), dtype=np.float32)[index]
                x = shift_and_flip(x, u, crop, flip)
        if self.beside is not None:
            other = dataclasses.replace(self.beside, index=self.index, draw=self.draw)
            x = torch.cat([x, other.__getitems__(keys)[0]], 1)
        return x, torch.from_numpy(self.y[index]), torch.from_numpy(index)

    def _read(self, i: int, key: tuple, crop: bool, flip: bool) -> Tensor:
        im, view = read_picture(self.paths[i], self.border_px), self.view
        if crop:
            mode = v2.InterpolationMode(view.interpolation)
            view = v2.RandomResizedCrop(view.size_px, interpolation=mode, antialias=True)
        with seeded(*key):
            im = view(im)
            return v2.functional.pil_to_tensor(v2.RandomHorizontalFlip()(im) if flip else im)


def as_images(images) -> ImageSet:
    """An ImageSet of: itself; (x, y); a DataLoader of such batches; or any sized data set of
    (image, label), which is read into memory.  Images are uint8 (3,S,S), or float in [0, 1]."""
    if isinstance(images, ImageSet):
        return images
    x, y = torch.empty(0), ()
    if isinstance(images, (tuple, list)) and len(images) == 2:
        x, y = images
    elif len(images):
        join = torch.cat if isinstance(images, torch.utils.data.DataLoader) else torch.stack
        pairs = images if join is torch.cat else (images[i] for i in range(len(images)))
        x, y = (join([torch.as_tensor(v) for v in part]) for part in zip(*pairs))
    if x.is_floating_point() and x.numel() and 0 <= x.min() and x.max() <= 1:
        x = (x * 255).round().to(torch.uint8)
    shape = tuple(x.shape)
    if x.dtype != torch.uint8 or shape != (len(y), 3, *shape[-1:] * 2) or not len(y):
        raise UserError(f"images: expected uint8 (n,3,S,S), or floats in [0, 1], and n labels, got "
                        f"{x.dtype} {shape} and {len(y)}")
    classes = [str(k) for k in range(int(max(y)) + 1)]
    return ImageSet("images", y, classes, View(x.shape[-1]), images=x)


class Batches:
    """Batch sampler of training: the global order of (seed, epoch), this rank's share of it.

    Yields lists of (epoch, position) from micro-batch `start` on, without end."""

    def __init__(self, n: int, batch: int, seed: int, start: int = 0):
        rank, size = world()
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


def _kill_workers() -> None:
    """At exit, ends workers whose iterator is still held, by a traceback for example: Python would
    wait for ever for the effect of a SIGTERM, which they ignore."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)        # torch's handler reports it as a crash
    for process in torch.multiprocessing.active_children():
        if process.daemon:
            process.kill()


def loader(jobs, workers: int, **options) -> torch.utils.data.DataLoader:
    """DataLoader whose workers leave Ctrl-C and SIGTERM to this process, which stops when it is
    ready, and end with it, however it ends; the number of workers changes no sample."""
    def leave_signals(_):
        for s in STOPS:
            signal.signal(s, signal.SIG_IGN)

    if isinstance(jobs, ImageSet) and jobs.images is not None:
        workers = 0
    if workers:
        atexit.unregister(_kill_workers)                 # once, and before multiprocessing's own
        atexit.register(_kill_workers)
    return torch.utils.data.DataLoader(
        jobs, num_workers=workers, collate_fn=lambda batch: batch, worker_init_fn=leave_signals,
        multiprocessing_context="fork" if workers else None,
        pin_memory=torch.cuda.is_available(), **options)


# ---- shapes: a procedural set --------------------------------------------------------------------

def _box(x: Tensor, y: Tensor, w: float, h: float) -> Tensor:
    """Signed field of the rectangle |x| < w, |y| < h."""
    return torch.maximum(x.abs() - w, y.abs() - h)


def _star(x: Tensor, y: Tensor, n: int, tip: float, dent: float) -> Tensor:
    """Signed field of a star: n tips at the one radius, n dents at the other."""
    step, r = math.pi / n, torch.hypot(x, y)
    a = (torch.remainder(torch.atan2(x, y), 2 * step) - step).abs()     # folded: 0 dent, step tip
    along, across = tip * math.cos(step) - dent, tip * math.sin(step)   # from the dent to the tip
    return ((r * a.cos() - dent) * across - r * a.sin() * along) / math.hypot(along, across)


# Signed fields, negative inside, on coordinates of about -1..1, y up.
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda x, y: torch.hypot(x, y) - 0.75,
    "triangle": lambda x, y: _star(x, y, 3, 0.95, 0.475),
    "square": lambda x, y: _box(x, y, 0.66, 0.66),
    "pentagon": lambda x, y: _star(x, y, 5, 0.9, 0.73),
    "hexagon": lambda x, y: _star(x, y, 6, 0.9, 0.78),
    "star": lambda x, y: _star(x, y, 5, 1.0, 0.4),
    "cross": lambda x, y: torch.minimum(_box(x, y, 0.85, 0.24), _box(x, y, 0.24, 0.85)),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.62).abs() - 0.17,
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 0.85,
                                           0.7 - torch.hypot(x - 0.45, y)),
    "heart": lambda x, y: torch.minimum((x.abs() + y.abs() - 0.64) / 2 ** 0.5,
                                        torch.hypot(x.abs() - 0.32, y - 0.32) - 0.32 * 2 ** 0.5),
}


def _hues(u: Tensor, pale: float) -> Tensor:
    """Colours (B,3,1,1) of the hues u (B,1,1) in 0..1, no channel below `pale`."""
    wave = torch.cos(2 * math.pi * (u[:, None] + torch.arange(3)[:, None, None] / 3))
    return pale + (1 - pale) * (0.5 + 0.5 * wave)


def _render_shapes(u: Tensor, field: Callable, size: int, style: str) -> Tensor:
    """uint8 images (B,3,size,size) of one shape from u (B,11,1,1) in 0..1, which draws angle, size,
    place, stretch, colours and light.

    Style "": solids, bright to faint, on an empty, nearly black ground: noise, fog, frost and
    brightness destroy that, as on Fashion-MNIST.  "r": drawings, outlines and hatching."""
    g = (torch.arange(size) + 0.5) / size * 2 - 1
    gy, gx = torch.meshgrid(-g, g, indexing="ij")
    turn, scale = 2 * u[:, 0] - 1, 0.2 + 0.5 * u[:, 1]
    dx, dy = gx - 0.5 * (u[:, 2] - 0.5), gy - 0.5 * (u[:, 3] - 0.5)
    x, y = dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()
    d = scale * field(x / scale, y / scale / (0.85 + 0.3 * u[:, 4]))
    cover = lambda d: (0.5 - d * size / 2).clamp(0, 1)              # the share of a pixel inside
    colour, ground = _hues(u[:, 5], 0.3), _hues(u[:, 6], 0.5) * u[:, 9:10]
    if style == "r":
        hatch = torch.sin((gx + gy) * (18 + 10 * u[:, 7])) < 2.4 * u[:, 8] - 1.2
        mask = torch.maximum(cover(d.abs() - 0.05), cover(d) * hatch)
        ground, ink = 0.12 * ground, 0.2 + 0.5 * colour
    else:
        light = 0.8 + 0.3 * (gx * (u[:, 7] - 0.5) + gy * (u[:, 8] - 0.5))
        mask, ground, ink = cover(d) * light, 0.06 * ground, colour * 0.25 ** u[:, 10:11]
    return (255 * torch.lerp(ground, ink, mask[:, None]) + 0.5).to(torch.uint8)


def make_shapes(n: int, size: int, split: str, style: str = "") -> tuple[Tensor, np.ndarray]:
    """(x uint8 (n,3,size,size), y (n,)): image i is a function of (split, style, i) alone."""
    u = np.random.default_rng(fold("shapes", split, style)).random((n, 11, 1, 1), np.float32)
    x, y = torch.empty(n, 3, size, size, dtype=torch.uint8), np.arange(n) % len(SHAPES)
    for k, field in enumerate(SHAPES.values()):
        for at in torch.from_numpy(np.flatnonzero(y == k)).split(64):      # fits the CPU's cache
            x[at] = _render_shapes(torch.from_numpy(u)[at], field, size, style)
    return x, y


# ---- sets from disk: a reader gives paths (or images), labels and class names --------------------

def subfolders(top: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    return sorted(e.name for e in os.scandir(top) if e.is_dir() and not e.name.startswith("."))


def read_tree(top: Path, label: dict[str, int]) -> tuple[list[str], list[int]]:
    """(paths, labels) of TOP/FOLDER/.../IMAGE.  label: of each folder by its name, never by its
    place in the text order; other folders are passed over, and hidden files."""
    found = [(p, k) for c, k in label.items() for p in pictures_below(top / c)]
    return [str(p) for p, _ in found], [k for _, k in found]


def read_list(file: Path, top: Path, label: Callable) -> tuple[list[str], list[int]]:
    """(paths, labels) of a list's lines, the path below top first; label: words of a line -> it."""
    lines = [line.split() for line in read_lines(file, "the list of images")]
    try:
        return [f"{top}/{words[0].lstrip('/')}" for words in lines], [label(w) for w in lines]
    except (ValueError, IndexError) as e:
        raise UserError(f"{file} is not the published list ({e}): unpack it again") from None


def _tree(row: SetRow, top: Path, train: bool, data: Data):
    names = row.classes() if row.classes else subfolders(top)
    return *read_tree(top, row.label() if row.label else {c: k for k, c in enumerate(names)}), names


def _tiny(row: SetRow, top: Path, train: bool, data: Data):
    """As published: the validation images lie in one folder, their labels in a list."""
    names = sorted(read_lines(top.parent / "wnids.txt", row.name))
    if train:
        return *read_tree(top, {c: k for k, c in enumerate(names)}), names
    label = lambda words: names.index(words[1])                                        # noqa: E731
    return *read_list(top / "val_annotations.txt", top / "images", label), names


def _sun(row: SetRow, top: Path, train: bool, data: Data):
    """The first of the ten official partitions; a line is /a/abbey/NAME.jpg."""
    names = read_lines(top / "ClassName.txt", row.name)
    label = lambda words: names.index(words[0].rpartition("/")[0])                     # noqa: E731
    file = top / ("Training_01.txt" if train else "Testing_01.txt")
    return *read_list(file, top, label), [c[3:] for c in names]


def _places(row: SetRow, top: Path, train: bool, data: Data):
    """Lists of lines "a/abbey/NAME.jpg 0"; a class is named by its folder."""
    lists, images = top / "trainvalsplit_places205", "data/vision/torralba/deeplearning/images256"
    label = lambda words: int(words[1])                                                # noqa: E731
    paths, y = read_list(lists / "val_places205.csv", top / images, label)
    names = dict(sorted((k, p.partition(images)[2][3:].rpartition("/")[0])
                        for p, k in zip(paths, y)))
    if train:
        paths, y = read_list(lists / "train_places205.csv", top / images, label)
    return paths, y, list(names.values())


def _flowers(row: SetRow, top: Path, train: bool, data: Data):
    """torchvision's layout; training = the official train and val, as in CLIP's linear probes."""
    cls = torchvision.datasets.Flowers102
    try:
        parts = [cls(top.parent, split) for split in (("train", "val") if train else ("test",))]
    except (RuntimeError, ModuleNotFoundError) as e:
        raise UserError(f"{row.name}: {e} ({top}; scipy reads its labels: pip install scipy)") \
            from None
    return ([str(p) for part in parts for p in part._image_files],
            [y for part in parts for y in part._labels], cls.classes)


def _torchvision_set(row: SetRow, top: Path, train: bool, data: Data):
    """MNIST, Fashion-MNIST (28 px, padded to 32) and CIFAR through torchvision's own classes."""
    cls = {"fashion-mnist": "FashionMNIST"}.get(row.name, row.name.upper())
    try:
        raw = getattr(torchvision.datasets, cls)(data.root, train=train, download=False)
    except RuntimeError:
        raise UserError(f"{top} is incomplete: {row.get.replace('ROOT', data.root)}") from None
    x = torch.as_tensor(raw.data)
    if x.ndim == 3:
        return F.pad(x, (2, 2, 2, 2))[:, None].expand(-1, 3, -1, -1), raw.targets, raw.classes
    return x.permute(0, 3, 1, 2), raw.targets, raw.classes


def _shapes(row: SetRow, top: Path, train: bool, data: Data):
    n, most = (row.n_train, data.n_train) if train else (row.n_test, data.n_test)
    style = "r" if row.name == "shapes-r" else ""
    return *make_shapes(min(n, most or n), data.size_px or 32, "train" if train else "test",
                        style), SHAPES


# ---- the table -----------------------------------------------------------------------------------

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
    file = f"data/_info/imagenet_{part + '_' if part else ''}synsets.txt"
    return tuple((Path(timm.__file__).parent / file).read_text().split())


@dataclass(frozen=True)
class SetRow:
    """A row of the table of sets: what it should hold, how to get it, where it lies below data.root
    (one fixed path a split).  All sets are scored by top-1 over their own classes.

    read: (row, folder, train, data) -> paths or images, labels, class names.
    classes, label: the names of the classes, and each folder's label, where these are not the
    folders in sorted order.  part: of ImageNet's outputs those that are scored; None = no such set.
    view: the set's own, whatever the network's.  archive: folder of its published -c copy."""
    name: str
    n_train: int                  # published numbers of images, 0 = no such split
    n_test: int
    n_classes: int
    get: str
    test: str = ""
    train: str = ""
    read: Callable = _tree
    classes: Callable | None = None
    label: Callable | None = None
    part: str | None = None
    border_px: int = 0
    view: View | None = None
    archive: str = ""

    @property
    def outputs(self) -> tuple[str, ...]:
        return () if self.part is None else synsets()

    @property
    def ids(self) -> Tensor | None:
        """(C,k): the outputs of an ImageNet network that mean class k; None = all, in order."""
        if self.part == "objectnet":
            wide = max(map(len, OBJECTNET.values()))
            return torch.tensor([i + i[:1] * (wide - len(i)) for i in OBJECTNET.values()])
        place = {s: k for k, s in enumerate(synsets())} if self.part else {}
        return torch.tensor([[place[s]] for s in synsets(self.part)]) if self.part else None


def imagenet_row(name: str, n_test: int, get: str, test: str, part: str = "", **more) -> SetRow:
    """A row of ImageNet's classes, all or a part."""
    names = {"objectnet": lambda: tuple(OBJECTNET)}.get(part, functools.partial(synsets, part))
    n = {"": 1000, "objectnet": 113}.get(part, 200)
    return SetRow(name, more.pop("n_train", 0), n_test, n, get, test, part=part, classes=names,
                  **more)


_TV = "python -c \"import torchvision as t; t.datasets.{}('ROOT', download=True)\""
_VAL = "image-net.org (ILSVRC2012); torchvision.datasets.ImageNet sorts the archives into folders"
SETS: dict[str, SetRow] = {row.name: row for row in (
    SetRow("shapes", 20000, 2000, 10, "made here, no file", read=_shapes),
    SetRow("shapes-r", 0, 2000, 10, "made here, no file", read=_shapes),
    SetRow("fashion-mnist", 60000, 10000, 10, _TV.format("FashionMNIST"), "FashionMNIST/raw",
           "FashionMNIST/raw", _torchvision_set),
    SetRow("mnist", 60000, 10000, 10, _TV.format("MNIST"), "MNIST/raw", "MNIST/raw",
           _torchvision_set),
    SetRow("cifar10", 50000, 10000, 10, _TV.format("CIFAR10") + "; -c: zenodo.org/record/2535967",
           "cifar-10-batches-py", "cifar-10-batches-py", _torchvision_set, archive="CIFAR-10-C"),
    SetRow("cifar100", 50000, 10000, 100, _TV.format("CIFAR100")
           + "; -c: zenodo.org/record/3555552", "cifar-100-python", "cifar-100-python",
           _torchvision_set, archive="CIFAR-100-C"),
    imagenet_row("imagenet", 50000, _VAL + "; -c: zenodo.org/record/2235448", "imagenet/val",
                 n_train=1281167, train="imagenet/train", archive="imagenet-c"),
    imagenet_row("imagenet@a", 10000, _VAL, "imagenet/val", "a"),
    imagenet_row("imagenet@r", 10000, _VAL, "imagenet/val", "r"),
    imagenet_row("imagenet@objectnet", 6250, _VAL, "imagenet/val", "objectnet",
                 label=lambda: {synsets()[i]: k for k, ids in enumerate(OBJECTNET.values())
                                for i in ids}),
    imagenet_row("imagenet-v2", 10000, "huggingface.co/datasets/vaishaal/ImageNetV2: imagenetv2-"
                 "matched-frequency.tar.gz", "imagenetv2-matched-frequency-format-val",
                 label=lambda: {str(k): k for k in range(1000)}),
    imagenet_row("imagenet-a", 7500, "github.com/hendrycks/natural-adv-examples: imagenet-a.tar",
                 "imagenet-a", "a"),
    imagenet_row("imagenet-r", 30000, "github.com/hendrycks/imagenet-r: imagenet-r.tar",
                 "imagenet-r", "r"),
    imagenet_row("imagenet-sketch", 50889,
                 "github.com/HaohanWang/ImageNet-Sketch: ImageNet-Sketch.zip", "sketch"),
    imagenet_row("objectnet", 18574, "objectnet.dev: objectnet-1.0.zip (its licence forbids to "
                 "train on it)", "objectnet-1.0/images", "objectnet", border_px=2),
    SetRow("tiny-imagenet", 100000, 10000, 200, "cs231n.stanford.edu/tiny-imagenet-200.zip; -c: "
           "zenodo.org/record/2536630", "tiny-imagenet-200/val", "tiny-imagenet-200/train", _tiny,
           view=View(64, 1.0), archive="Tiny-ImageNet-C"),
    SetRow("flowers102", 2040, 6149, 102, _TV.format("Flowers102"), "flowers-102", "flowers-102",
           _flowers),
    SetRow("places205", 2448873, 20500, 205, "places.csail.mit.edu/downloadData.html: images "
           "(256 px) and trainvalsplit_places205, both in places205/", "places205", "places205",
           _places),
    SetRow("inaturalist2021", 500000, 100000, 10000, "github.com/visipedia/inat_comp/tree/master/"
           "2021: train_mini.tar.gz and val.tar.gz as 2021_train_mini/ and 2021_valid/",
           "2021_valid", "2021_train_mini"),
    SetRow("sun397", 19850, 19850, 397, "vision.princeton.edu/projects/2010/SUN: SUN397.tar.gz, "
           "and in SUN397/ the lists of Partitions.zip", "SUN397", "SUN397", _sun),
)}


def base_name(name: str) -> tuple[str, bool]:
    """(the clean set, whether it is corrupted) of a set's name: cifar10-c -> (cifar10, True)."""
    name = name.partition(" (")[0]                     # "imagenet-c (regenerated)"
    if "folder-c:" in name:
        return name.replace("folder-c:", "folder:", 1), True
    is_c = name.endswith("-c") and "folder:" not in name
    return (name[:-2], True) if is_c else (name, False)


def corrupted_name(name: str) -> str:
    """The name of a set's ImageNet-C-like copy."""
    return name.replace("folder:", "folder-c:", 1) if "folder:" in name else f"{name}-c"


FOLDER = re.compile(r"(?:([^@]+)@)?folder(-c)?:(.+)")              # LABEL@folder:PATH


def set_row(name: str) -> SetRow | None:
    """The row of a set, also of its -c; None for a folder.  Raises: UserError."""
    if FOLDER.fullmatch(name):
        return None
    return choose(SETS | {f"{n}-c": r for n, r in SETS.items()}, name, "set")


def cells(images: ImageSet) -> list[tuple[str, int]]:
    """The cells of a set: [("", 0)], or the 15 corruptions x 5 severities of a -c set."""
    return [(c, s) for c in CORRUPTIONS for s in range(1, 6)] if images.corrupted else [("", 0)]


def _complete(images: ImageSet, data: Data) -> ImageSet:
    """The set under the name that says what it is: regenerated, a part of the published images.

    Raises: UserError where it is a part and that is not allowed."""
    n, want, row = len(images.y), images.expected, SETS.get(images.base)
    name = corrupted_name(images.base) if images.corrupted else images.base
    if not n or want and n != want and not data.allow_partial:
        raise UserError(f"{name}: {n:,} images in {images.source}, expected {want:,}: it is "
                        "incomplete or holds more; unpack it again, or data.allow_partial=true to "
                        "use it as it is")
    notes = []
    if images.corrupted and not images.archive and row and row.archive:
        notes.append("regenerated")
    if want and n != want:
        notes.append(f"{n:,} of {want:,} images")
    return dataclasses.replace(images, name=name + (f" ({', '.join(notes)})" if notes else ""))


def _open_folder(base: str, top: Path, train: bool, view: View) -> ImageSet:
    """Any class-per-folder tree: TOP/train and TOP/val (or test), or, to score only, TOP itself."""
    halves = [top / s for s in (("train",) if train else ("val", "test")) if (top / s).is_dir()]
    if not top.is_dir() or not halves and (train or (top / "train").is_dir()):
        raise UserError(f"{top}: no folder {top / ('train' if train else 'val')}: training takes "
                        f"{top}/train/CLASS/IMAGE and {top}/val/CLASS/IMAGE, scoring any "
                        "FOLDER/CLASS/IMAGE")
    top = halves[0] if halves else top
    names = subfolders(top)
    paths, y = read_tree(top, {c: k for k, c in enumerate(names)})
    empty = [c for k, c in enumerate(names) if k not in set(y)]
    if len(names) < 2 or empty:
        raise UserError(f"{top}: expected {top}/CLASS/IMAGE with two classes or more, found "
                        f"{len(names)}, without images {empty[:3] or 'none'}")
    return ImageSet(base, y, names, view, paths=paths, source=str(top))


def _open_row(row: SetRow, data: Data, train: bool, view: View) -> ImageSet:
    """The set of a row.  Raises: Absent; UserError where it has no such split."""
    n, folder = (row.n_train, row.train) if train else (row.n_test, row.test)
    top = Path(data.root) / folder
    if not n:
        raise UserError(f"{row.name} has no training split: it is there to be scored")
    if not top.is_dir() and folder:
        raise Absent(f"{row.name} is not there: looked for {top}; expected {n:,} "
                     f"{'training' if train else 'test'} images of {row.n_classes:,} classes; get "
                     f"it: {row.get.replace('ROOT', data.root)}; another place: data.root=FOLDER")
    found, y, names = row.read(row, top, train, data)
    if len(names) != row.n_classes:
        raise UserError(f"{row.name}: {len(names):,} classes in {top}, expected "
                        f"{row.n_classes:,}: unpack it again")
    common = dict(border_px=row.border_px, outputs=row.outputs, source=str(top) if folder else "-",
                  ids=row.ids, expected=n if folder else len(y))
    if isinstance(found, Tensor):
        size = data.size_px or found.shape[-1]
        return ImageSet(row.name, y, names, View(size, 1.0), images=found, **common)
    own = row.view is not None
    return ImageSet(row.name, y, names, row.view or view, paths=found, own_view=own, **common)


def open_cell(base: str, data: Data, corruption: str, severity: int) -> ImageSet:
    """A cell of a published -c archive: CIFAR's arrays, folders, or folders in the tars' groups.

    Raises: UserError where it is missing or incomplete."""
    row, top = SETS[base], Path(data.root) / SETS[base].archive
    array = top / f"{corruption}.npy"
    folders = [p for p in (top / corruption / str(severity),
                           *top.glob(f"*/{corruption}/{severity}")) if p.is_dir()]
    common = dict(corrupted=True, archive=top, own_view=True, expected=row.n_test,
                  outputs=row.outputs)
    if array.is_file() and (top / "labels.npy").is_file():     # the five severities in one array
        try:
            x, y = np.load(array, mmap_mode="r"), np.load(top / "labels.npy")
        except (ValueError, EOFError) as e:
            raise UserError(f"{array}, or labels.npy beside it: {e}") from None
        part = slice((severity - 1) * len(y) // 5, severity * len(y) // 5)
        x = torch.tensor(x[part]).permute(0, 3, 1, 2).contiguous()
        images = ImageSet(base, y[part], [str(k) for k in range(row.n_classes)],
                          View(data.size_px or x.shape[-1]), images=x, source=str(array), **common)
    elif folders:
        names = row.classes() if row.classes else subfolders(folders[0])
        paths, y = read_tree(folders[0], {c: k for k, c in enumerate(names)})
        images = ImageSet(base, y, names, row.view or View(224, 1.0), paths=paths,
                          source=str(folders[0]), **common)    # 224 px files are not touched
    else:
        raise UserError(f"{top} lacks the cell {corruption}/{severity}: unpack the rest, or move "
                        f"the folder away to have all made from {base}")
    return _complete(images, data).subset(data.n_test)


def open_set(name: str, data: Data = Data(), split: str = "test", view: View = View()) -> ImageSet:
    """The named set.  view: how a network wants picture files to be cut; data.size_px and data.fit
    go before it.

    A -c set is the published archive (its first cell) where that is on disk, else the clean set, to
    be corrupted; ImageNet's pictures are then cut as the benchmark's were, whatever the view.
    Raises: UserError when it is unknown, absent (Absent) or incomplete."""
    is_c, train, row = base_name(name)[1], split == "train", set_row(name)
    if train and is_c:
        raise UserError(f"{name} has no training split: it is there to be scored")
    if is_c and row and row.archive and (Path(data.root) / row.archive).is_dir():
        return open_cell(row.name, data, CORRUPTIONS[0], 1)
    view = dataclasses.replace(view, size_px=data.size_px or view.size_px,
                               squash=data.fit == "squash" if data.fit else view.squash)
    benchmark = is_c and row and row.part is not None
    if row:
        images = _open_row(row, data, train, View() if benchmark else view)
    else:
        label, _, path = FOLDER.fullmatch(name).groups()
        images = _open_folder(label or f"folder:{path}", Path(path), train, view)
    own = bool(images.own_view or benchmark)
    images = dataclasses.replace(images, corrupted=is_c, own_view=own)
    return _complete(images, data).subset(data.n_train if train else data.n_test)


# ==== 6. MODELS ====
# In: a name or a module.  Out: a network from images (uint8 or [0, 1]) to logits, and the same
# network as a list of stages.  Always: stages(net)(x) equals net(x) to the last bit.


@dataclass(frozen=True)
class Card:
    """What a network knows of itself; it is saved beside its weights.

    name: what `build` makes it from.  size_px: side of the images that it sees, 0 = as they come.
    view: how picture files become its pixels.  classes: names of its outputs, () = not known.
    home: the set that it was trained on.  prompts: (names, templates) of a zero-shot network;
    clip: the file of its two towers, "" = by the name's tag.  fresh: its classifier is not trained.
    probe: what a linear probe was fitted on.  prompted, student, team, vqgan: the keywords of
    `prompted`, a Student, a Team (its teacher as a card), a VQGAN.
    label: its name in the tables; key: the settings that made it; train: {images, seconds}."""
    name: str = ""
    n_classes: int = 0
    size_px: int = 0
    view: View = View()
    classes: tuple[str, ...] = ()
    home: str = ""
    prompts: tuple = ()
    clip: str = ""
    fresh: bool = False
    probe: str = ""
    label: str = ""
    prompted: dict = dataclasses.field(default_factory=dict)
    student: dict = dataclasses.field(default_factory=dict)
    team: dict = dataclasses.field(default_factory=dict)
    vqgan: dict = dataclasses.field(default_factory=dict)
    key: dict = dataclasses.field(default_factory=dict)
    train: dict = dataclasses.field(default_factory=dict)

    @property
    def known(self) -> tuple[str, ...]:
        """The classes of the outputs as far as they are known: 1000 that nobody named are
        ImageNet's."""
        return self.classes or (synsets() if self.n_classes == len(synsets()) else ())

    @property
    def has_text(self) -> bool:
        """Whether prompts name the classes: it is a CLIP without a linear head."""
        return bool(self.prompts) or self.name.startswith("open_clip:") and not self.n_classes


class Net(nn.Module):
    """A network that takes images and normalises and resizes them for itself.

    net: any module from normalised images to logits.  mean, std: of images in [0, 1].
    Shapes: x (B,3,H,W), uint8 or in [0, 1] -> logits (B, n_classes)."""

    def __init__(self, net: nn.Module, card: Card = Card(), mean=(0.0,) * 3, std=(1.0,) * 3):
        super().__init__()
        self.net, self.card = net, card
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def prepare(self, x: Tensor) -> Tensor:
        """Normalised images of this network's size."""
        x, size = x.float() / 255 if x.dtype == torch.uint8 else x, self.card.size_px
        if size and x.shape[-1] != size:
            x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True)
        return (x - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.prepare(x))


def full_precision(x: Tensor):
    """Context without autocast, which the meta device (`gflops`) does not know."""
    kind = x.device.type
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


class TextHead(nn.Module):
    """Zero-shot classifier: exp(logit_scale) cos(h, class embedding) + logit_bias, in float32.

    weight (C,D): the classes' embeddings; nothing here is trained.
    Shapes: image embeddings h (B,D) -> logits (B,C).  Paper: [A] section 4.4."""

    def __init__(self, weight: Tensor, logit_scale=0.0, logit_bias=None):
        super().__init__()
        self.register_buffer("weight", F.normalize(weight.float(), dim=-1))
        self.register_buffer("logit_scale", torch.tensor(float(logit_scale)))
        self.register_buffer("logit_bias", torch.tensor(float(logit_bias or 0.0)))

    @property
    def out_features(self) -> int:
        return len(self.weight)

    def forward(self, h: Tensor) -> Tensor:
        with full_precision(h):
            cosine = F.normalize(h.float(), dim=-1) @ self.weight.T
            return self.logit_scale.exp() * cosine + self.logit_bias


class Tower(nn.Module):
    """The visual tower of a CLIP and a head on its embeddings: fc(visual(x)).

    Shapes: normalised images (B,3,H,W) -> logits (B, fc.out_features)."""

    def __init__(self, visual: nn.Module, fc: nn.Module, scale: tuple):
        super().__init__()
        self.visual, self.fc, self.scale = visual, fc, scale    # the CLIP's, for a TextHead

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.visual(x))


# ---- weights on disk -----------------------------------------------------------------------------

def card_of(meta: dict) -> Card:
    """The Card of its JSON."""
    return Card(**meta | {"view": View(**meta["view"]), "classes": tuple(meta["classes"]),
                          "prompts": tuple(map(tuple, meta["prompts"]))})


def read_card(path: Path | str) -> Card | None:
    """The Card that `save` wrote beside the tensors; None of a foreign file.  Raises: UserError."""
    if not Path(path).is_file():
        raise UserError(f"no weights file {path}")
    try:
        with safe_open(path, "pt") as f:
            return card_of(json.loads(f.metadata()["erpm"]))
    except Exception:                                     # what is wrong with it says read_state
        return None


def read_state(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a weights file by name: .safetensors, or a state dict of torch.save, also in
    "state_dict" or "model", by timm's reader.  Nothing is unpickled.  Raises: UserError."""
    import timm.models
    try:
        state = timm.models.load_state_dict(str(path), use_ema=False)
    except Exception as e:                                # pickle's and torch's own, of many kinds
        why = f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"
        raise UserError(f"{path} is no file of plain tensors, and nothing is unpickled here ({why})"
                        ": save its state dict alone, where you trust it") from None
    meta = {}
    if str(path).endswith(".safetensors"):
        with safe_open(path, "pt") as f:
            meta = f.metadata() or {}
    signed = {"erpm", "sha"} <= set(meta)
    if signed and meta["sha"] != sha(meta["erpm"], state):
        raise UserError(f"{path} is damaged: it does not hold what was saved; delete it to make it "
                        "again")
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state dict but {', '.join(map(str, state))[:200]}")
    return state


def load_strictly(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Loads the tensors into the module.  Raises: UserError that says what does not fit."""
    try:
        module.load_state_dict(state)
    except RuntimeError as e:
        raise UserError(f"{what}: {' '.join(str(e).split())[:400]}") from None


def load_foreign(net: nn.Module, path: Path | str, name: str, classes: int | None) \
        -> tuple[bool, int]:
    """Loads a file of the network's own library, or of ours; timm's position embeddings are
    resized.  Returns (the classifier is new: the file has none of that many classes; outputs).

    classes: None = the file's own number; without a classifier the network becomes an encoder.
    Raises: UserError."""
    state = {k.removeprefix("net."): v for k, v in read_state(path).items()}
    adapt = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    state = adapt(state, net) if adapt else state
    head = [k for k, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
    w, n = state.get(f"{head}.weight"), net.get_submodule(head).out_features
    fresh = w is None or len(w) != n
    if fresh and classes is None:
        net.set_submodule(head, nn.Identity() if w is None else nn.Linear(*w.shape[::-1]))
        fresh, n = False, 0 if w is None else len(w)
    for k, v in net.state_dict().items():
        if fresh and k.startswith(f"{head}."):
            state[k] = v
        if k.endswith("num_batches_tracked"):             # older versions of torch did not count
            state.setdefault(k, v)
    load_strictly(net, state, f"{path} does not fit {name}")
    return fresh, n


def from_hub(name: str, make: Callable):
    """make(), which may need a network.  Raises: UserError that names the way without one."""
    try:
        return make()
    except Exception as e:                                # the hubs' errors are of many kinds
        raise UserError(f"{name} could not be had ({type(e).__name__}: {str(e).splitlines()[0]}): "
                        "without a network give its weights as a local file, "
                        "model.student_weights=PATH or NAME=PATH") from None


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


def _cifar(name: str, classes: int | None, weights: str | None, size_px: int) -> Net:
    """resnetD[-wK][-s2]: the ResNet of depth D = 6n + 2 for small images (He et al. 2016, 4.2),
    K times as wide, with a stem of stride 2."""
    m = re.fullmatch(r"resnet(\d{1,3})(?:-w([1-9]\d?))?(?:-s([12]))?", name)
    if not m or int(m[1]) < 8 or (int(m[1]) - 2) % 6:
        raise UserError(f"unknown network cifar:{name}: expected cifar:resnetD[-wK][-s2] with "
                        "D = 8, 14, 20, ...")
    n, n_in, stride = (int(m[1]) - 2) // 6, 16 * int(m[2] or 1), int(m[3] or 1)
    layers = [nn.Sequential(nn.Conv2d(3, n_in, 3, stride, 1, bias=False), nn.BatchNorm2d(n_in),
                            nn.ReLU())]
    for level in range(3):
        for i in range(n):
            n_out = 16 * int(m[2] or 1) * 2 ** level
            layers.append(BasicBlock(n_in, n_out, 2 if level and not i else 1))
            n_in = n_out
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(n_in, classes or 10))
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    fresh, n = True, classes or 10
    if weights not in (None, "random"):
        fresh, n = load_foreign(net, weights, f"cifar:{name}", classes)
    card = Card(n_classes=n, size_px=size_px, view=View(size_px or 32), fresh=fresh)
    return Net(net, card, (0.5,) * 3, (0.25,) * 3)


def _timm(name: str, classes: int | None, weights: str | None, size_px: int) -> Net:
    """Any network of timm with its own mean, std, input size and view."""
    import timm
    choose(dict.fromkeys(timm.list_models() + timm.list_pretrained()), name, "network of timm")
    known, file = timm.get_pretrained_cfg(name), weights not in (None, "random")
    hub = "." in name and weights is None
    options = {} if classes is None else {"num_classes": classes}
    if size_px and known.fixed_input_size:                # position embeddings are of one size
        options["img_size"] = size_px
    make = functools.partial(timm.create_model, name, pretrained=hub, **options)
    net = from_hub(f"timm:{name}", make) if hub else make()
    fresh, n = not hub or known.num_classes != net.num_classes, net.num_classes
    if file:
        fresh, n = load_foreign(net, weights, f"timm:{name}", classes)
    cfg, size = net.pretrained_cfg, size_px or net.pretrained_cfg["input_size"][-1]
    fixed = size_px or file or "." in name or cfg.get("fixed_input_size")    # as it was trained
    view = View(size, cfg["crop_pct"], cfg["interpolation"], cfg.get("crop_mode") == "squash")
    return Net(net, Card(n_classes=n, size_px=size if fixed else 0, view=view, fresh=fresh),
               cfg["mean"], cfg["std"])


def _torchvision(name: str, classes: int | None, weights: str | None, size_px: int) -> Net:
    """Any classifier of torchvision; a tag gives its weights, their size and view."""
    models, (model, slash, tag) = torchvision.models, name.partition("/")
    choose(dict.fromkeys(models.list_models(module=models)), model, "network of torchvision")
    tags = dict(models.get_model_weights(model).__members__)
    kept = choose(tags, tag, f"weights of torchvision:{model}") if slash else None
    net, n = models.get_model(model, weights=None, num_classes=classes or 1000), classes or 1000
    fresh = not kept or weights == "random" or n != 1000
    if weights not in (None, "random"):
        fresh, n = load_foreign(net, weights, f"torchvision:{name}", classes)
    elif kept and weights is None:
        state = from_hub(f"torchvision:{name}", lambda: kept.get_state_dict(progress=False))
        if fresh:                                         # the classifier's weight and bias
            state |= dict(list(net.state_dict().items())[-2:])
        load_strictly(net, state, f"torchvision:{name}")
    t = kept.transforms() if kept else None
    view = View(size_px or t.crop_size[0], t.crop_size[0] / t.resize_size[0],
                t.interpolation.value) if t else View(size_px or 224)
    size = view.size_px if kept or size_px or weights not in (None, "random") else 0
    return Net(net, Card(n_classes=n, view=view, fresh=fresh, size_px=size),
               (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# A whole CLIP that trains in a minute on a CPU: the student of recipe demo-clip.
TINY_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}


def clip_model(name: str, weights: str | None = None, size_px: int = 0) -> nn.Module:
    """The whole CLIP MODEL[/TAG] of open_clip, both towers, in eval mode; erpm-tiny is ours.

    weights: None = those of the tag, a file of the whole model, or "random".  Raises: UserError."""
    import open_clip
    model, slash, tag = name.partition("/")
    if "erpm-tiny" not in open_clip.list_models():
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "erpm-tiny.json").write_text(json.dumps(TINY_CLIP))
            open_clip.add_model_config(Path(folder, "erpm-tiny.json"))
    choose(dict.fromkeys(open_clip.list_models()), model, "network of open_clip")
    if slash:
        tags = open_clip.list_pretrained_tags_by_model(model)
        choose(dict.fromkeys(tags), tag, f"weights of open_clip:{model}")
        wants = open_clip.get_pretrained_cfg(model, tag).get("quick_gelu")
        if wants and not open_clip.get_model_config(model).get("quick_gelu"):
            raise UserError(f"open_clip:{name}: these weights want QuickGELU and {model} has GELU: "
                            f"use open_clip:{model}-quickgelu/{tag}")
    source = {None: tag or None, "random": None}.get(weights, weights)
    if source and source != tag:
        read_state(source)                                # says what is wrong with the file
    was = logging.root.manager.disable
    logging.disable(logging.ERROR)                        # it warns of random weights at any name
    try:
        return from_hub(f"open_clip:{name}", lambda: open_clip.create_model(
            model, source, pretrained_text=False, force_image_size=size_px or None)).eval()
    finally:
        logging.disable(was)


def _open_clip(name: str, classes: int | None, weights: str | None, size_px: int) -> Net:
    """The visual tower of a CLIP with a linear head; None = without, it gives embeddings."""
    import open_clip
    model, clip = name.partition("/")[0], clip_model(name, weights, size_px)
    clip.visual.output_tokens = False                     # CoCa's tower gives a pair otherwise
    cfg, width = open_clip.get_model_preprocess_cfg(clip), open_clip.get_model_config(model)[
        "embed_dim"]
    tags = open_clip.list_pretrained_tags_by_model(model)
    if "/" not in name and tags:                          # as one of its weights wants it
        cfg |= {k: v for k, v in open_clip.get_pretrained_cfg(model, tags[0]).items() if k in cfg}
    size = clip.visual.image_size
    size = size if isinstance(size, int) else size[0]
    fc = nn.Linear(width, classes) if classes else nn.Identity()
    view = View(size, 1.0, cfg["interpolation"], cfg["resize_mode"] == "squash")
    card = Card(n_classes=classes or 0, size_px=size, view=view, clip=weights or "",
                fresh=bool(classes))
    tower = Tower(clip.visual, fc, (clip.logit_scale.detach(), clip.logit_bias))
    return Net(tower, card, cfg["mean"], cfg["std"])


FAMILIES = {"timm": _timm, "torchvision": _torchvision, "open_clip": _open_clip, "cifar": _cifar}


def has_tag(name: str) -> bool:
    """Whether the name asks for pretrained weights: timm:resnet50.tv_in1k,
    torchvision:resnet50/IMAGENET1K_V1 and open_clip:ViT-B-32-quickgelu/openai do."""
    family, _, rest = name.partition(":")
    return {"timm": ".", "torchvision": "/", "open_clip": "/"}.get(family, "\n") in rest


def named(name: str, classes: int | None = None, weights: str | None = None,
          size_px: int = 0) -> Net:
    """The network FAMILY:NAME in eval mode; see `build`, which knows more kinds of names."""
    family, colon, rest = name.partition(":")
    if not colon:
        raise UserError(f"network {name!r}: expected FAMILY:NAME, with FAMILY one of "
                        f"{', '.join(FAMILIES)}, e.g. timm:resnet50.tv_in1k")
    make, ours = choose(FAMILIES, family, "network family"), None
    if weights not in (None, "", "random"):
        ours = read_card(weights)
    net = make(rest, classes, weights or None, size_px).eval()
    card = net.card = dataclasses.replace(net.card, name=name)
    if ours:                                              # it sees images as when it was made
        size = {} if size_px else {"size_px": ours.size_px, "view": ours.view}
        net.card = dataclasses.replace(card, home=ours.home, classes=ours.classes, key=ours.key,
                                       train=ours.train, label=ours.label, **size)
    return net


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

    names: dotted paths.  The children are the network's own, not copies; what is not named does
    not come along."""

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
        with full_precision(h):                           # logits in float32: sigma, KL, ties
            return self.fc(h.float())


def _in_turn(n: nn.Module, x: Tensor) -> Tensor:
    """The children one after another."""
    for m in n.children():
        x = m(x)
    return x


def _eva_block(i: int, n: nn.Module, x: Tensor) -> Tensor:
    """Block i with the rotary embedding of the grid of patches (square, as all images here)."""
    [block] = n.blocks
    side = math.isqrt(x.shape[1] - n.num_prefix_tokens)
    free = n.dynamic_img_size or not hasattr(n.rope, "feat_shape")
    rope = n.rope.get_embed(shape=(side, side)) if free else n.rope.get_embed()
    return block(x, rope=rope[i] if n.rope_mixed else rope)


def _pooled(*names: str) -> Callable:
    """Forward of timm's networks behind the blocks: the named layers, then all but the Linear."""
    def pool(n: nn.Module, x: Tensor) -> Tensor:
        for name in names:
            x = n._modules[name](x)
        return n.forward_head(x, pre_logits=True)
    return pool


# By package and exact class: the children that hold the blocks, the forward of what comes after
# them but the classifier, the forward of what comes before, parameters that belong to the former.
CUTS = {
    "timm.VisionTransformer": ("blocks", _pooled("norm"), lambda n, x: n.norm_pre(n.patch_drop(
        n._pos_embed(n.patch_embed(x))))),
    "timm.Eva": ("blocks", _pooled("norm"), lambda n, x: n.norm_pre(
        n._pos_embed(n.patch_embed(x))[0])),
    "timm.ResNet": ("layer1 layer2 layer3 layer4", _pooled()),
    "timm.RegNet": ("s1 s2 s3 s4", _pooled("final_conv")),
    "timm.ConvNeXt": ("stages", _pooled("norm_pre")),
    "timm.SwinTransformer": ("layers", _pooled("norm")),
    "timm.SwinTransformerV2": ("layers", _pooled("norm")),
    "timm.EfficientNet": ("blocks", _pooled("conv_head", "bn2")),
    "timm.MobileNetV3": ("blocks", _pooled()),
    "timm.MlpMixer": ("blocks", _pooled("norm")),
    "torchvision.ResNet": ("layer1 layer2 layer3 layer4", lambda n, x: n.avgpool(x).flatten(1)),
    "open_clip.ModifiedResNet": ("layer1 layer2 layer3 layer4", _in_turn),
    "open_clip.VisionTransformer": ("transformer", lambda n, x: n._pool(x)[0] if n.proj is None else
                                    n._pool(x)[0] @ n.proj, lambda n, x: n._embeds(x), "proj"),
}


def _opened(modules) -> list[nn.Module]:
    """The modules in order, those in plain containers one by one."""
    out = []
    for m in modules:
        plain = type(m) in (nn.Sequential, nn.ModuleList) or type(m).__name__ == "RegStage"
        out += _opened(m.children()) if plain else [m]
    return out


def _split_chain(net: nn.Sequential) -> tuple[list[nn.Module], nn.Module, nn.Module]:
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


def _split_by_row(net: nn.Module, holders: str, after: Callable, before: Callable = _in_turn,
                  *late: str) -> tuple[list[nn.Module], nn.Module, nn.Module]:
    names, holders = list(net._modules), holders.split()
    first, last = names.index(holders[0]), names.index(holders[-1])
    fc = net.get_classifier() if hasattr(net, "get_classifier") else getattr(net, "fc", None)
    fc_path = next((k for k, m in net.named_modules() if m is fc), "")
    early = [*names[:first], *(k for k in (*net._parameters, *net._buffers) if k not in late)]
    for k in names[last + 1:]:               # all but the classifier, which may lie a level deeper
        if fc_path.startswith(f"{k}."):
            late += tuple(f"{k}.{c}" for c in net._modules[k]._modules if f"{k}.{c}" != fc_path)
        elif k != fc_path:
            late += (k,)
    blocks = _opened(net.get_submodule("transformer.resblocks" if k == "transformer" else k)
                     for k in holders)
    if getattr(net, "rope", None) is not None:           # every block is called with the rope
        blocks = [Part(net, (f"blocks.{i}", "rope"), functools.partial(_eva_block, i))
                  for i in range(len(net.blocks))]
    return [Part(net, early, before), *blocks], Part(net, late, after), fc or nn.Identity()


def split_net(net: nn.Module) -> tuple[list[nn.Module], nn.Module, nn.Module]:
    """(stages, features, fc), where net(x) is fc(features(the stages one after another)).

    All are net's own modules; for an encoder fc passes the embeddings on.  Raises: UserError."""
    kind = f"{type(net).__module__.partition('.')[0]}.{type(net).__name__}"
    if isinstance(net, Tower):
        body, features, projection = split_net(net.visual)
        return body, nn.Sequential(features, projection), net.fc
    if kind == "open_clip.TimmModel":
        body, features, projection = split_net(net.trunk)
        return body, nn.Sequential(features, projection, net.head), nn.Identity()
    if type(net) is nn.Sequential and len(net):
        return _split_chain(net)
    if kind not in CUTS:
        raise UserError(f"a {kind} cannot be cut into stages: known are {', '.join(CUTS)}; or pass "
                        "an nn.Sequential of your own that ends in a Linear")
    return _split_by_row(net, *CUTS[kind])


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


@torch.no_grad()
def cut(net: nn.Module, tune: int) -> tuple[nn.Sequential, nn.Sequential]:
    """(frozen backbone, tail): the tail is the last `tune` stages and the classifier.

    Raises: UserError; also unless the stages give what the network gives on a random image."""
    parts, name = stages(net), getattr(getattr(net, "card", None), "name", "") or "the network"
    at = len(parts) - 1 - tune
    if at < 1:
        raise UserError(f"tune = {tune}: {name} has {len(parts) - 1} stages, of which the first "
                        "stays frozen")
    if isinstance(net, Net) and type(net.net) is not nn.Sequential:   # a chain is itself in order
        p, side = next(net.parameters()), net.card.size_px or net.card.view.size_px
        x = torch.rand(1, 3, side, side, generator=rng("cut")).to(p.device)
        if not torch.allclose(parts.eval()(x), net.eval()(x), rtol=1e-3, atol=1e-5):
            raise UserError(f"the stages of {name} do not give what it gives: this version of its "
                            "library computes something else")
    return freeze(parts[:at]), parts[at:]


# ---- visual prompts ------------------------------------------------------------------------------

class Prompted(nn.Module):
    """A block of a ViT that sees trained tokens behind its own: `put` are added before it, and the
    last `off` taken off after it.  Shapes: (B,N,D) -> (B, N + put - off, D)."""

    def __init__(self, block: nn.Module, width: int, put: int, off: int):
        super().__init__()
        self.block, self.off = block, off
        self.prompt = nn.Parameter(torch.empty(put, width).uniform_(-1, 1) * (6 / width) ** 0.5)

    def forward(self, x: Tensor, **options) -> Tensor:
        x = torch.cat([x, self.prompt.to(x.dtype).expand(len(x), -1, -1)], 1)
        x = self.block(x, **options)
        return x[:, :x.shape[1] - self.off]


def prompted(net: Net, n: int = 10, deep: bool = True) -> Net:
    """The ViT with n prompt tokens, in place: deep = new ones before every block, else before the
    first.  They stand behind the other tokens, have no position and are off before the pooling.

    Paper: VPT (Jia et al. 2022).  Raises: UserError on what is no ViT of timm or open_clip."""
    vit = next((m for m in net.modules() if type(m).__name__ == "VisionTransformer"), None)
    if vit is None:
        raise UserError(f"vpt: {net.card.name or 'the network'} has no tokens to add prompts to: "
                        "take a ViT of timm or open_clip")
    blocks = vit.blocks if hasattr(vit, "blocks") else vit.transformer.resblocks
    width = next(m for m in blocks.modules() if isinstance(m, nn.LayerNorm)).normalized_shape[-1]
    for i, block in enumerate(blocks):
        put, off = (n if deep or end else 0 for end in (i == 0, i == len(blocks) - 1))
        blocks[i] = Prompted(block, width, put, off)
    net.card = dataclasses.replace(net.card, prompted={"n": n, "deep": deep})
    return net


# ---- the VQGAN of [B] ----------------------------------------------------------------------------

# Published checkpoints by name, and one that is trained here; taming-transformers' words, and the
# groups of a norm, which are 32 there: with as few channels they would take the colour away.
VQGANS = {
    "vqgan_openimages_f8_16384": dict(
        n_embed=16384, embed_dim=4, z_channels=4, ch=128, ch_mult=(1, 2, 2, 4), num_res_blocks=2,
        attn_resolutions=(32,), resolution=256),
    "vqgan_imagenet_f16_1024": dict(
        n_embed=1024, embed_dim=256, z_channels=256, ch=128, ch_mult=(1, 1, 2, 2, 4),
        num_res_blocks=2, attn_resolutions=(16,), resolution=256),
    "tiny_f2_256": dict(
        n_embed=256, embed_dim=8, z_channels=32, ch=32, ch_mult=(1, 1), num_res_blocks=0,
        attn_resolutions=(), resolution=32, groups=4),
}


class ResBlock(nn.Module):
    """Two convolutions behind group norm and swish, and what they are added to."""

    def __init__(self, n_in: int, n_out: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(groups, n, 1e-6) for n in (n_in, n_out))
        self.conv1, self.conv2 = (nn.Conv2d(n, n_out, 3, 1, 1) for n in (n_in, n_out))
        if n_in != n_out:
            self.nin_shortcut = nn.Conv2d(n_in, n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class SpatialAttention(nn.Module):
    """Single-head attention over all places, added to its input."""

    def __init__(self, n: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, n, 1e-6)
        self.q, self.k, self.v = (nn.Conv2d(n, n, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(n, n, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).mT for f in (self.q, self.k, self.v))         # (B,HW,C)
        h = F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)
        return x + self.proj_out(h)


class Coder(nn.Module):
    """Encoder of a VQGAN, images (B,3,S,S) in [-1, 1] -> (B, z_channels, s, s), or its decoder."""

    def __init__(self, c: dict, down: bool):
        super().__init__()
        n, widths, groups = len(c["ch_mult"]), [c["ch"] * m for m in c["ch_mult"]], c["groups"]
        width, levels = c["ch"] if down else widths[-1], {}
        self.conv_in = nn.Conv2d(3 if down else c["z_channels"], width, 3, 1, 1)
        for i in range(n) if down else reversed(range(n)):
            blocks, attention = nn.ModuleList(), nn.ModuleList()
            for _ in range(c["num_res_blocks"] + (not down)):
                blocks.append(ResBlock(width, widths[i], groups))
                width = widths[i]
                if c["resolution"] >> i in c["attn_resolutions"]:
                    attention.append(SpatialAttention(width, groups))
            levels[i] = nn.ModuleDict({"block": blocks, "attn": attention})
            if down and i < n - 1:
                levels[i]["downsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, 2)})
            elif not down and i > 0:
                levels[i]["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, 1, 1)})
        self.add_module("down" if down else "up", nn.ModuleList(levels[i] for i in range(n)))
        self.order = list(levels)
        self.mid = nn.ModuleDict({"block_1": ResBlock(widths[-1], widths[-1], groups),
                                  "attn_1": SpatialAttention(widths[-1], groups),
                                  "block_2": ResBlock(widths[-1], widths[-1], groups)})
        self.norm_out = nn.GroupNorm(groups, width, 1e-6)
        self.conv_out = nn.Conv2d(width, c["z_channels"] if down else 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        down, x = hasattr(self, "down"), self.conv_in(x)
        if not down:
            x = _in_turn(self.mid, x)
        for i in self.order:
            level = (self.down if down else self.up)[i]
            for k, block in enumerate(level["block"]):
                x = block(x)
                x = level["attn"][k](x) if len(level["attn"]) else x
            if "downsample" in level:
                x = level["downsample"]["conv"](F.pad(x, (0, 1, 0, 1)))
            if "upsample" in level:
                x = level["upsample"]["conv"](F.interpolate(x, scale_factor=2.0))
        if down:
            x = _in_turn(self.mid, x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    """Images in [0, 1] -> the same as seen through a codebook, in [0, 1]: decode(quantise(encode)).

    Its tensors have the names and shapes of taming-transformers' VQModel (Esser et al. 2021).
    Shapes: (B,3,S,S), S a multiple of `factor`."""

    def __init__(self, config: dict):
        super().__init__()
        self.card = Card("vqgan", vqgan=config)
        self.factor = 2 ** (len(config["ch_mult"]) - 1)
        self.encoder, self.decoder = Coder(config, True), Coder(config, False)
        z, e, n = config["z_channels"], config["embed_dim"], config["n_embed"]
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(n, e)})
        nn.init.uniform_(self.codes, -1 / n, 1 / n)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, e, 1), nn.Conv2d(e, z, 1)

    @property
    def codes(self) -> nn.Parameter:
        return self.quantize["embedding"].weight

    def encode(self, x: Tensor) -> Tensor:
        """(B,E,s,s) before it is quantised."""
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise UserError(f"vqgan: images of {x.shape[-1]} px are no multiple of {self.factor}: "
                            "set data.size_px, or take another vqgan.name")
        return self.quant_conv(self.encoder(2 * x - 1))

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """(B,s,s): the code that is nearest by squared L2, in float32."""
        with full_precision(z):
            flat = z.float().permute(0, 2, 3, 1).flatten(0, 2)                   # (B s s, E)
            near = [torch.addmm(self.codes.square().sum(1), some, self.codes.T, alpha=-2).argmin(1)
                    for some in flat.split(2 ** 14)]    # all but |z|^2, which is the same for all
        return torch.cat(near).view(len(z), *z.shape[2:])

    def decode(self, q: Tensor) -> Tensor:
        """Images of codes (B,E,s,s), not clamped to [0, 1] yet."""
        return self.decoder(self.post_quant_conv(q)).float() / 2 + 0.5

    def lookup(self, index: Tensor) -> Tensor:
        """Codes (B,E,s,s) of their numbers (B,s,s)."""
        return self.quantize["embedding"](index).permute(0, 3, 1, 2)

    def forward(self, x: Tensor, free: float | None = None):
        """The images as the codes show them; in training, with a share `free` of places that are
        not quantised, (images, z, codes)."""
        z = self.encode(x)
        q = self.lookup(self.nearest(z))
        through = z + (q - z).detach()                      # the gradient goes straight through
        if free is None:
            return self.decode(through).clamp(0, 1)
        kept = torch.rand(len(z), 1, *z.shape[2:], device=z.device) < free
        return self.decode(torch.where(kept, z, through)), z, q


def vqgan(config: str | dict, weights: Path | str | None = None) -> VQGAN:
    """The VQGAN of a name, of a YAML file of taming-transformers, or of a mapping of its words.

    weights: a local file, loaded strictly: .safetensors or a state dict, also in "state_dict";
    the discriminator and perceptual loss ("loss.*") are left out.  Without one they are random.
    Raises: UserError."""
    if isinstance(config, str) and config.endswith((".yaml", ".yml")):
        model = read_yaml(Path(config)).get("model")
        config = model.get("params", {}) if isinstance(model, dict) else {}
    config = dict(choose(VQGANS, config, "vqgan.name") if isinstance(config, str) else config)
    config = {"groups": 32} | config | config.pop("ddconfig", {})
    lacks = [k for k in VQGANS["tiny_f2_256"] if k not in config]
    if lacks or config.get("double_z"):
        raise UserError(f"vqgan: the configuration lacks {', '.join(lacks)}" if lacks else
                        "vqgan: double_z is a VAE's, not a VQGAN's")
    net = VQGAN({k: config[k] for k in VQGANS["tiny_f2_256"]})
    if weights:
        try:
            state = read_state(weights)
        except UserError as e:
            raise UserError(f"{e}: torch.save(torch.load({str(weights)!r}, weights_only=False)"
                            "['state_dict'], 'vqgan.pt') makes one of a Lightning file") from None
        state = {k: v for k, v in state.items() if not k.startswith("loss.")}
        load_strictly(net, state, f"{weights} does not fit the VQGAN")
    return net


# ---- zero-shot: prompts in the place of a classifier ---------------------------------------------

def prompts_of(images: ImageSet, templates: str = "", names: str = "") -> tuple[tuple, tuple]:
    """(names, templates) of the classes that a network answers with on a set.

    names: a file; "" = OpenAI's where the classes are synsets, else the set's own, _ and - as
    spaces.  templates: a file; "" = OpenAI's 80 for ImageNet, else a photo of a {}."""
    import open_clip
    known = dict(zip(synsets(), open_clip.IMAGENET_CLASSNAMES))
    classes = tuple(known.get(c, re.sub("[_-]+", " ", c)) for c in images.outputs)
    lines = tuple(read_lines(templates, "model.templates")) if templates else (
        tuple(t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES)
        if images.outputs == synsets() else ("a photo of a {}.",))
    given = tuple(read_lines(names, "data.names")) if names else ()
    if len(given) == len(classes):                        # else they are of another set's classes
        classes = given
    bad = [t for t in lines if t.count("{}") != 1]
    if bad or not lines:
        raise UserError(f"model.templates: expected lines with one {{}} for the class, got {bad}")
    return classes, lines


def text_weights(card: Card, prompts: tuple, cache: Path | None = None) -> Tensor:
    """Class embeddings (C,D) of norm 1 by open_clip's build_zero_shot_classifier: the mean over
    the templates of normalised prompt embeddings, normalised again.

    cache: folder that keeps them, so that a text tower runs once.  Raises: UserError."""
    import open_clip
    if card.clip not in ("", "random") and not Path(card.clip).is_file():
        raise UserError(f"{card.name}: its text tower is not in {card.clip}, so new classes cannot "
                        "be named: put back the file that it was made from")
    source = sha(Path(card.clip)) if card.clip not in ("", "random") else card.clip
    file = cache and cache / f"text-{fold(card.name, source, prompts):016x}.safetensors"
    if file and file.is_file():
        return read_state(file)["weight"]
    model, device = card.name.partition(":")[2], pick_device()
    clip = clip_model(model, card.clip or None, card.size_px).to(device)
    tokenizer = from_hub(f"the tokenizer of {card.name}",
                         lambda: open_clip.get_tokenizer(model.partition("/")[0]))
    templates = [functools.partial(t.replace, "{}") for t in prompts[1]]
    weight = open_clip.build_zero_shot_classifier(clip, tokenizer, prompts[0], templates,
                                                  device=device).T.float().cpu().contiguous()
    if file and world()[0] == 0 and source != "random":
        write_atomically(file, safetensors_bytes({"weight": weight}))
    return weight


def zero_shot(model: nn.Module, prompts: tuple, cache: Path | None = None) -> nn.Module:
    """The same network or Student for the classes of (names, templates): all weights are shared,
    the class embeddings are new.  Raises: UserError without the text tower's file."""
    if model.card.prompts == prompts:
        return model
    weight = text_weights(model.card, prompts, cache)
    out = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    if isinstance(out, Net) and not isinstance(out.net.fc, TextHead):
        out.net.fc = TextHead(weight, *out.net.scale)
    for head in (m for m in out.modules() if isinstance(m, TextHead)):
        head.weight = F.normalize(weight, dim=-1).to(head.weight.device)
    out.card = dataclasses.replace(model.card, n_classes=len(weight), prompts=prompts, classes=())
    return out


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

    METHOD [A] section 3.3: T stochastic passes.  Sampling draws T masks from the key alone and
    gives every image the same T masks: T sub-networks, so that a prediction does not depend on the
    other images of its batch and the same image always gets the same answer."""

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
    """A trained part on a frozen network: in training mode only dropout is switched on, so
    BatchNorm keeps the pretrained statistics, unless norms = "own".  The baselines train a tail as
    `cut` gives it."""

    def __init__(self, tail: nn.Module | None = None, norms: str = "frozen"):
        super().__init__()
        self.tail, self.norms = tail, norms

    def train(self, mode: bool = True):
        super().train(False)
        kinds = (Dropout, nn.modules.batchnorm._BatchNorm) if self.norms == "own" else Dropout
        for m in self.modules():
            if isinstance(m, kinds):
                m.training = mode
        self.training = mode
        return self

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


TINY = 1e-12      # a head that agrees with the combined one to the last bit has KL 0, and so would
#                   win or lose every product; and log 0 of an underflown probability is not finite


def divergence(mean: Tensor) -> Tensor:
    """KL(head || combined) of the clean and the robust head, (B,2) in nats, from mean (B,3,C).

    METHOD [A] section 3.3: on very noisy input the clean head may collapse onto a random class with
    a small sigma; far from the combined head it is not believed."""
    log = mean.float().clamp_min(TINY).log()
    return (mean[:, ::2].float() * (log[:, ::2] - log[:, 1:2])).sum(-1).clamp_min(0)


# METHOD [A] eq. 6: the head with the least objective answers.  s sigma, d divergence, m mean, z
# logits, all of the clean and the robust head, (B,2) or (B,2,C).  "product" is [A]'s as we read it
# (product or sum is not stated); the others are the ablations of Tables 6 and 7, and ours.
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
    Paper: [A] eq. 6.  Raises: UserError on an unknown rule, sigma = 0, a missing input."""
    choose(RULES, rule, "rule")
    if rule in HEADS:
        return torch.full((len(mean),), HEADS.index(rule), device=mean.device)
    if rule == "oracle" and y is None or rule == "max-logit" and logits is None:
        raise UserError(f"rule {rule!r} needs the {'labels' if rule == 'oracle' else 'logits'}")
    if rule == "oracle":
        right = mean[:, ::2].argmax(-1) == y[:, None]                                    # (B,2)
        return torch.where(right[:, 1] & ~right[:, 0], 2, 0)
    if rule in NEEDS_SIGMA and not sigma.any():
        raise UserError(f"rule {rule!r}: sigma is 0 everywhere, there is no live dropout")
    z = None if logits is None else logits[:, ::2]
    return 2 * OBJECTIVES[rule](sigma, divergence(mean), mean[:, ::2], z).argmin(-1)


def answer(mean: Tensor, sigma: Tensor, head: Tensor, rule: str) -> Tensor:
    """Probabilities (B,C) of the answering head; "soft" mixes clean and robust by 1/(sigma KL)."""
    if rule != "soft":
        return mean[torch.arange(len(mean), device=mean.device), head]
    weight = 1 / OBJECTIVES["product"](sigma, divergence(mean), None, None)
    weight = weight / weight.sum(-1, keepdim=True)
    return (mean[:, ::2] * weight[..., None]).sum(1)


def project(z: Tensor, ids: Tensor | None) -> Tensor:
    """Logits (..., N) -> (..., C): for each class the largest of the outputs that mean it.

    ids (C,k): of ImageSet; None = the outputs are the classes."""
    return z if ids is None else z[..., ids.to(z.device)].amax(-1)


class Student(nn.Module):
    """[A] fig. 2: a frozen network whose last `tune` stages are tuned, with three heads.

    net: the pretrained network, a Net, or any module from images in [0, 1] to logits that `stages`
    can cut; its modules become the frozen backbone and the clean head's teacher.
    tune: stages tuned; head: of these the last ones that each head has for itself.
    dropout_in: "tail" as [A] (tuned stages and classifiers), "head" = before the classifiers only.
    forward(x) -> Heads; x (B,3,H,W), uint8 or in [0, 1]."""

    def __init__(self, net: nn.Module, tune: int = 2, head: int = 2, dropout: float = 0.1, *,
                 dropout_in: str = "tail"):
        super().__init__()
        net = net if isinstance(net, Net) else Net(net)
        if not 0 <= head <= tune:
            raise UserError(f"head = {head}: expected 0 to tune = {tune}")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout = {dropout}: expected 0 or more and less than 1")
        self.backbone, tail = cut(net, tune)
        self.tuned = ThreeHeads(tail, head, dropout, dropout_in)
        self.original = freeze(tail)
        self.dropout, self.early = dropout, dropout_in == "tail" and tune > 0
        self.card = dataclasses.replace(net.card, n_classes=tail[-1].fc.out_features, student=dict(
            tune=tune, head=head, dropout=dropout, dropout_in=dropout_in))

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
        drops = [m for m in self.tuned.modules() if isinstance(m, Dropout)]
        for d in drops:
            d.sample = (passes, 0 if self.early else f.shape[0])
        try:
            yield f.repeat(passes, *[1] * (f.ndim - 1)) if self.early else f
        finally:
            for d in drops:
                d.sample = None

    @torch.no_grad()
    def moments(self, f: Tensor, passes: int = 10, ids: Tensor | None = None) \
            -> tuple[Tensor, Tensor, Tensor]:
        """(mean probabilities (B,3,C), sigma (B,2), mean logits (B,3,C)) from boundary features f.

        sigma: standard deviation over the dropout passes of the probability of the class that the
        head predicts, of the clean and robust head.  passes = 0: closed form, exact to first order
        for dropout before the classifiers, without randomness; dropout in the stages is then off.
        ids: the outputs that count, for sets of fewer classes.
        Paper: [A] section 3.3; differs: all images share the T masks."""
        mode = self.training
        self.eval()
        out = self._sampled(f, passes, ids) if passes else self._closed_form(f, ids)
        self.train(mode)
        return out

    def _sampled(self, f: Tensor, passes: int, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        with self._sampling(f, passes) as repeated:
            z = torch.stack([h.float().unflatten(0, (passes, -1)) for h in self.tuned(repeated)], 2)
        z = project(z, ids)
        p = z.softmax(-1)                                                        # (T,B,3,C)
        mean = p.mean(0)
        top = mean.argmax(-1, keepdim=True).expand(len(p), -1, -1, -1)
        sigma = p.gather(-1, top)[..., 0].std(0, correction=0)                   # (B,3)
        return mean, sigma[:, ::2], z.mean(0)

    def _closed_form(self, f: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Dropout moves a feature h_i by variance h_i^2 p/(1-p), and p_top to first order by
        d p_top / d h, which autograd knows for any classifier."""
        f, found, q = self.tuned.shared(f), [], self.dropout / (1 - self.dropout)
        for *blocks, last in self.tuned.heads.values():
            h = last.features(nn.Sequential(*blocks)(f)).float()                 # (B,D)
            with torch.enable_grad(), full_precision(f):
                h = h.detach().requires_grad_()
                z = project(last.fc(h.view_as(h)).float(), ids)      # a leaf stops FLOP counters
                [g] = torch.autograd.grad(z.softmax(-1).amax(-1).sum(), h)       # image by image
            found.append((z.detach(), (q * (g * h.detach()).square().sum(-1)).sqrt()))
        z, sigma = (torch.stack(v, 1) for v in zip(*found))
        return z.softmax(-1), sigma[:, ::2], z

    def pick_head(self, mean: Tensor, sigma: Tensor, rule: str, **more) -> Tensor:
        """`select` on moments of this network: saturated, it may have a sigma of 0 on a whole
        batch although its dropout is live."""
        return select(mean, sigma.clamp_min(TINY) if self.dropout else sigma, rule, **more)

    def predict(self, x: Tensor, passes: int = 10, rule: str = "product") -> Prediction:
        """What the chosen head says.  passes: dropout passes in one batch after one pass of the
        backbone; 0 = closed form.  rule: one of RULES that needs no label.

        Raises: UserError when the rule needs sigma and there is no live dropout."""
        if rule in NEEDS_SIGMA and self.dropout == 0:
            raise UserError(f"rule {rule!r} needs sigma, which is 0 without dropout: set dropout "
                            "above 0")
        mean, sigma, logits = self.moments(self.features(x), passes)
        head = self.pick_head(mean, sigma, rule, logits=logits)
        return Prediction(answer(mean, sigma, head, rule), head, sigma, divergence(mean))


# ---- the team: the robust teacher stays --------------------------------------------------------

def team(clean: Tensor, robust: Sequence[Tensor], tau: float = 0.5) -> Tensor:
    """Probabilities (B,C) of a clean answer and several robust ones, (B,C) each.

    METHOD ours: r = the mean of the robust answers; the clean one weighs exp(-KL(clean||r) / tau),
    so that it is heard unless they contradict it, and r the rest.  Nothing is fitted."""
    r = sum(robust) / len(robust)
    gap = clean.clamp_min(TINY).log() - r.clamp_min(TINY).log()
    w = (-(clean * gap).sum(-1, keepdim=True) / tau).exp().clamp(max=1)
    return w * clean + (1 - w) * r


class Ways(nn.Module):
    """A network whose last `tune` stages stand twice on one frozen backbone: as they were, and a
    copy that is to become robust.  forward(x) -> logits (clean, robust), (B,C) each."""

    def __init__(self, net: Net, tune: int):
        super().__init__()
        self.card = net.card
        self.backbone, tail = cut(net, tune)
        self.robust = copy.deepcopy(tail).requires_grad_(True)
        self.original = freeze(tail)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.backbone(x)
        return self.original(f), self.robust(f)


class Team(nn.Module):
    """A network and the robust teacher, which stays beside it: they answer by `team`.

    net: a Net, whose answer is the clean one, or a Student or Ways, whose last head is a robust
    one; tune: a Net is made Ways of so many stages.  forward(x) -> log probabilities (B,C)."""

    def __init__(self, net: nn.Module, teacher: Net, tune: int | None = None):
        super().__init__()
        self.net, self.teacher = net if tune is None else Ways(net, tune), teacher
        self.card = dataclasses.replace(net.card, team={
            "tune": tune, "teacher": dataclasses.asdict(teacher.card)})

    def forward(self, x: Tensor, ask: Callable | None = None) -> Tensor:
        """ask: (module, x) -> its output, where it is known already."""
        z, zt = (ask(m, x) if ask else m(x) for m in (self.net, self.teacher))
        clean, *robust = (z[0], z[-1]) if isinstance(z, tuple) else (z,)
        clean, *robust = (v.float().softmax(-1) for v in (clean, *robust, zt))
        return team(clean, robust).clamp_min(TINY).log()


# ---- losses --------------------------------------------------------------------------------------

def kd(z: Tensor, teacher: Tensor, t: float) -> Tensor:
    """t^2 KL(softmax(teacher/t) || softmax(z/t)) of logits (B,C), in float32, the batch's mean."""
    log_p, log_q = (F.log_softmax(v.float() / t, -1) for v in (teacher, z))
    return t * t * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def head_loss(z: Tensor, teacher: Tensor, y: Tensor, alpha: float, t: float,
              smoothing: float = 0.0) -> Tensor:
    """(1-a) CE(z, y) + a t^2 KL(softmax(teacher/t) || softmax(z/t)), in float32, the batch's mean.

    Paper: [A] eq. 3-4, "weighted sum of classification and distillation loss"; the form is ours."""
    ce = F.cross_entropy(z.float(), y, label_smoothing=smoothing)
    return (1 - alpha) * ce + alpha * kd(z, teacher, t)


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
    # METHOD [A] eq. 5: their sum
    return clean | robust


def interpolate(original: nn.Module, tuned: nn.Module, alpha: float) -> dict[str, Tensor]:
    """The state (1 - alpha) original + alpha tuned, at 0 and 1 exactly that of one.

    Paper: WiSE-FT (Wortsman et al. 2022).  Raises: UserError on networks that differ in more than
    their weights."""
    a, b = original.state_dict(), tuned.state_dict()
    odd = sorted(k for k in {*a, *b} if k not in a or k not in b or a[k].shape != b[k].shape)
    if odd:
        raise UserError(f"cannot interpolate two networks of other tensors: {', '.join(odd[:4])}")
    counts = b if alpha else a                            # what is no float cannot be mixed
    return {k: torch.lerp(a[k].to(v), v, alpha) if v.is_floating_point() else counts[k]
            for k, v in b.items()}


# ---- [B]: discrete adversarial samples -----------------------------------------------------------

def _norm(v: Tensor) -> Tensor:
    """The L2 norm of each image, (B,1,1,1), never 0."""
    return v.flatten(1).norm(dim=1).clamp_min(TINY).view(-1, 1, 1, 1)


def dad_samples(x: Tensor, y: Tensor, teacher: nn.Module, vqgan: VQGAN, generator, *,
                radius: float = 0.1, step: float = 0.1, steps: int = 1, start: float = 0.8,
                through: bool = False) -> Tensor:
    """Discrete adversarial samples x' of images, (B,3,S,S) in [0, 1].

    Shapes: x (B,3,S,S), uint8 or in [0, 1]; y (B,).  teacher: images in [0, 1] -> logits.
    generator: one, from which the images draw in turn, or a sequence of one for each image.
    radius, step: L2 norms, of the ball around the reconstruction and of a step.  start: probability
    of a random start.  through: the gradient crosses the quantiser, straight through.
    Paper: [B]'s algorithm, as its code has it; the student has no part in it."""
    each = [generator] * len(x) if isinstance(generator, torch.Generator) else generator
    draws = [(torch.rand((), generator=g, device=g.device) < start,
              torch.randn(x.shape[1:], generator=g, device=g.device)) for g in each]
    noise = torch.stack([n * on for on, n in draws]).to(x.device)
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    with torch.no_grad():
        x0 = vqgan(x)
    v = (x0 + radius * noise / _norm(noise)).clamp(0, 1)
    for _ in range(steps):
        with torch.enable_grad():
            v.requires_grad_()
            z = teacher(vqgan(v) if through else v.view_as(v))      # a leaf stops FLOP counters
            [g] = torch.autograd.grad(F.cross_entropy(z.float(), y, reduction="sum"), v)
        # METHOD [B]: an ascent step on the teacher's loss, then back into the ball
        d = v.detach() + step * g / _norm(g) - x0
        v = (x0 + d * (radius / _norm(d)).clamp(max=1)).clamp(0, 1)
    with torch.no_grad():
        return vqgan(v)


def dad_loss(z: Tensor, zt: Tensor, y: Tensor, t: float = 4.0, smoothing: float = 0.0) \
        -> dict[str, Tensor]:
    """{part: loss} of a student on b images x and, where they follow, as many samples x'; their
    sum is minimised.

    Shapes: z of the student, zt of its teacher, (b or 2b,C); y (b,), or soft (b,C).
    Paper: [B]'s objective; x' has no cross-entropy."""
    b = len(y)
    # METHOD [B]: CE(s(x), y) + t^2/2 KL(t(x) || s(x)) + t^2/2 KL(t(x') || s(x'))
    parts = {"ce": F.cross_entropy(z[:b].float(), y, label_smoothing=smoothing),
             "kd": kd(z[:b], zt[:b], t) / 2}
    return parts if len(z) == b else parts | {"kd_dad": kd(z[b:], zt[b:], t) / 2}


# ---- files of trained networks -------------------------------------------------------------------

def save(path: Path | str, module: nn.Module, **more) -> None:
    """Writes a Net's or a Student's state as .safetensors, with its Card, from which `load` builds
    it.  more: fields of the Card to set."""
    module = module if hasattr(module, "card") else Net(module)
    module.card = dataclasses.replace(module.card, **more)
    state = {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}
    meta = {"erpm": json.dumps(dataclasses.asdict(module.card))}
    meta["sha"] = sha(meta["erpm"], state)
    write_atomically(Path(path), safetensors_bytes(state, meta))


def bare(card: Card, state: dict[str, Tensor]) -> Net:
    """The network of a card before its tensors are loaded."""
    if not card.prompts:
        return named(card.name, card.n_classes, "random", card.size_px)
    net = named(card.name, None, "random", card.size_px)
    width = next(v.shape[1] for k, v in state.items() if k.endswith("fc.weight"))
    net.net.fc = TextHead(torch.ones(card.n_classes, width))
    return net


def load(run: str | Path, net: nn.Module | None = None) -> nn.Module:
    """The Student or Net that a run or `save` made, in eval mode, ready for `predict`.

    run: a run's folder (its model.safetensors) or a weights file.  net: your own module, where it
    was made from one.  Nothing is downloaded.  Raises: UserError."""
    path = Path(run) / "model.safetensors" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise UserError(f"no trained model {path}: run `python erpm.py distill` first, or name a "
                        "run's folder that holds model.safetensors")
    card, state = read_card(path), read_state(path)
    if card is None or not card.name and net is None:
        raise UserError(f"{path} was not made by erpm.py from a network of its names: "
                        f"build(NAME, weights={str(path)!r}), or load({str(path)!r}, net=MODULE)")
    beside = path.parent / Path(card.clip).name
    if beside.is_file() and not Path(card.clip).is_file():               # the run was moved
        card = dataclasses.replace(card, clip=str(beside))
    if card.clip == "both towers":
        net = zero_shot(named(card.name, None, str(path), card.size_px), card.prompts)
        net.card = dataclasses.replace(card, clip=str(path))
        return freeze(net)
    if card.vqgan:
        net = VQGAN(card.vqgan)
    net = bare(card, state) if net is None else net if hasattr(net, "card") else Net(net)
    if card.prompted:
        prompted(net, **card.prompted)
    module = Student(net, **card.student) if card.student else net
    if card.team:
        beside = card_of(card.team["teacher"])
        module = Team(module, bare(beside, state), card.team["tune"])
        module.teacher.card = beside
    load_strictly(module, state, f"{path} does not fit {card.name or 'the module'}")
    module.card = card
    return freeze(module)


def build(name: str | nn.Module, classes: int | Sequence[str] | None = None,
          weights: str | None = None, *, size_px: int = 0,
          templates: Sequence[str] = ("a photo of a {}.",)) -> nn.Module:
    """The network of that name, in eval mode.

    name: "timm:resnet50.tv_in1k", "torchvision:resnet50/IMAGENET1K_V1",
    "open_clip:ViT-B-32-quickgelu/openai" (a tag loads its pretrained weights), "cifar:resnet20-w2",
    "run:runs/x" (what that run made), or your own module, which is returned as it is.
    classes: number of outputs; None = the network's own.  A tag or file of other classes comes with
    a new classifier.  Names of classes make a zero-shot network of an open_clip name.
    weights: a local file instead of the tag's, loaded strictly; for open_clip one of the whole
    CLIP; "random" = none.  size_px: side of the images that it is to see; 0 = its own.
    Raises: UserError on an unknown name and on weights that do not fit."""
    if isinstance(name, nn.Module):
        return name
    if name.startswith("run:"):
        return load(name[4:])
    if classes is None or isinstance(classes, int):
        return named(name, classes, weights, size_px)
    if not name.startswith("open_clip:"):
        raise UserError(f"{name} has no text tower: names of classes want an open_clip:NAME")
    return zero_shot(named(name, None, weights, size_px), (tuple(classes), tuple(templates)))


# ==== 8. TRAINING ====
# In: a module, step(model, batch) -> (loss, {name: 0-d tensor}) and images.  Out: trained weights
# and log.jsonl.  Always: an interrupted run goes on to the same weights, on a CPU bit for bit.


class Batch(NamedTuple):
    """x uint8 (B,3,S,S), y (B,), a CPU generator, a function of (seed, step, rank), and for each
    image a key of (seed, epoch, index)."""
    x: Tensor
    y: Tensor
    generator: torch.Generator
    keys: Sequence[tuple] = ()


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
    dtype = None if device.type == "meta" else amp_type(amp, device)
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
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=cfg.lr)


class Signals:
    """Context in which Ctrl-C, SIGTERM and SIGHUP only set `hit`, for the loop to stop at a safe
    point."""
    last, late = signal.SIGINT, False                        # what stopped this process

    def __enter__(self):
        self.hit = 0
        self.old = {s: signal.signal(s, self._note) for s in STOPS}
        return self

    def _note(self, number, frame):
        if self.hit and number == signal.SIGINT:             # a second Ctrl-C is impatient
            raise KeyboardInterrupt
        self.hit = Signals.last = number
        Signals.late = True

    def __exit__(self, *exc):
        for s, handler in self.old.items():
            signal.signal(s, handler)


def differences(old: dict, new: dict) -> str:
    """What differs between two mappings, as "a.b: 1 -> 2", or ""."""
    return ", ".join(f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted({*old, *new})
                     if old.get(k) != new.get(k))


def read_jsonl(path: Path, damaged: Callable = lambda text: None) -> list[dict]:
    """The file's rows; none if it is absent.  damaged: is told of lines that are no JSON; a last
    one that a crash cut off is dropped without a word."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    rows = []
    for i, line in enumerate(lines, 1):
        try:
            rows.append({**json.loads(line)})
        except (ValueError, TypeError):
            if i < len(lines):
                damaged(f"{path}, line {i}: not JSON, it is left out")
    return rows


def keep(path: Path | None, parts: dict, step: int, seconds: float, key: dict | None) -> None:
    """Writes a checkpoint, on the first process, and keeps the one before it; returns when it is
    there on all."""
    if path and world()[0] == 0:
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"step": step, "seconds": seconds, "key": json.dumps(key),
                  "processes": world()[1]}
        torch.save(state, content := io.BytesIO())
        if path.is_file():
            os.replace(path, path.with_suffix(".ckpt1"))
        write_atomically(path, content.getvalue() + sha(content.getvalue()).encode())
    any_rank(False)                              # all wait for the file


def resume(path: Path | None, parts: dict, key: dict | None) -> tuple[int, float]:
    """(step, seconds) of the checkpoint, or where it is damaged of the one before it, whose states
    go back into the parts; (0, 0) without one.

    Raises: UserError if all are damaged, or another job's."""
    files = [p for p in (path, path and path.with_suffix(".ckpt1")) if p and p.is_file()]
    for file in files:
        try:
            content = file.read_bytes()
            if sha(content[:-16]) != content[-16:].decode():
                raise ValueError
            saved = torch.load(io.BytesIO(content[:-16]), map_location="cpu", weights_only=True)
        except Exception:                                    # truncated, foreign, or a pickle
            say(f"{file} is damaged: it is left out")
            continue
        changed = differences(json.loads(saved["key"]), key)
        if changed:
            raise UserError(f"{file} is a half-done job with other settings ({changed}): finish it "
                            "with those, delete it, or take another run=NAME")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        if saved["processes"] != world()[1]:
            say(f"{file}: made by {saved['processes']} processes, goes on with {world()[1]}: the "
                "same images a step, other draws of augmentation and dropout")
        return saved["step"], saved["seconds"]
    if files:
        raise UserError(f"{path} is damaged: delete {' and '.join(p.name for p in files)} to start "
                        "this stage again")
    return 0, 0.0


def log_row(checkpoint: Path | None, row: dict, sums: dict[str, Tensor], n: int) -> str:
    """Appends the means of n steps to log.jsonl beside the checkpoint; what the terminal is told.

    Raises: UserError on a loss that is not finite."""
    means = {k: round(float(v) / n, 5) for k, v in sums.items()}
    if not all(map(math.isfinite, means.values())):
        raise UserError(f"{row['stage']}: the loss is not finite at step {row['step']} ({means}); "
                        "the last checkpoint stands; try a smaller learning rate or "
                        "runtime.amp=none")
    if checkpoint and world()[0] == 0:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with open(checkpoint.with_name("log.jsonl"), "a") as f:
            f.write(json.dumps(row | means) + "\n")
    return f"loss {means['loss']:.4f}"


def add_gradients(model: nn.Module, step: Callable, data: Iterator, accum: int, scaler,
                  amp: str, seed: int, at: int, per_epoch: int) -> dict[str, Tensor]:
    """Losses of step `at`, means of its micro-batches, whose gradients are added up.

    per_epoch: micro-batches.  All that is random is a function of seed, micro-batch and rank."""
    device, sums = pick_device(), {}
    for k in range(accum):
        x, y, index = next(data)
        key, epoch = (seed, at, k, world()[0]), (at * accum + k) // per_epoch
        torch.manual_seed(fold("dropout", *key))             # dropout has the global generator
        batch = Batch(x.to(device, non_blocking=True), y.to(device, non_blocking=True),
                      rng("step", *key), [(seed, epoch, i) for i in index.tolist()])
        one_by_one = world()[1] > 1 and k < accum - 1        # processes average their sums once
        with model.no_sync() if one_by_one else contextlib.nullcontext():
            with autocast(amp, device):
                loss, parts = step(model, batch)
            scaler.scale(loss / accum).backward()
        for name, v in {"loss": loss, **parts}.items():
            sums[name] = sums.get(name, 0) + v.detach() / accum
    return sums


def update(opt: torch.optim.Optimizer, scaler, lr: float, clip: float) -> None:
    """One optimizer step on the gradients that have been added up."""
    for group in opt.param_groups:
        group["lr"] = lr
    scaler.unscale_(opt)
    if clip:
        nn.utils.clip_grad_norm_((p for g in opt.param_groups for p in g["params"]), clip)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad(set_to_none=True)


def fit(model: nn.Module, step: Callable, images: ImageSet, cfg: Train, runtime: Runtime, *,
        name: str, seed: int, checkpoint: Path | None = None, key: dict | None = None,
        workers: int = 0) -> dict[str, float]:
    """Trains the module in place and returns {"images", "seconds", "gflops" (an image)}.

    step(model, Batch) -> (loss, {name: 0-d tensor}) makes one forward through `model`, which is
    the module or its DDP wrapper.  images: as `training` made them.  checkpoint: where it goes on
    if it was interrupted, log.jsonl beside it; key tells whose that is; None = nothing is written.
    Raises: UserError on a loss that is not finite; Interrupted on a signal."""
    device, size, seed = pick_device(), world()[1], fold(seed, name)
    model.to(device).train()
    batches = Batches(len(images), cfg.batch // cfg.accum, seed)
    per_epoch = max(1, batches.per_epoch // cfg.accum)
    total = max(1, round(cfg.epochs * per_epoch))
    parts = {"model": model, "opt": make_optimizer(model, cfg),
             "scaler": torch.amp.GradScaler(enabled=amp_type(runtime.amp, device) == torch.float16)}
    if cfg.ema:
        swa = torch.optim.swa_utils
        parts["average"] = swa.AveragedModel(
            model, multi_avg_fn=swa.get_ema_multi_avg_fn(cfg.ema), use_buffers=True)
    at, seconds = resume(checkpoint, parts, key)
    batches.start = at * cfg.accum
    data = iter(loader(images, workers, batch_sampler=batches))
    wrapped = model if size == 1 else nn.parallel.DistributedDataParallel(model)
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{name}: {len(images):,} images, {total:,} steps of {cfg.batch}, {n:,} trained parameters"
        + (f"; goes on at step {at:,}" if at else ""))
    sums, logged, since, counter = {}, at, time.perf_counter(), FlopCounterMode(display=False)
    with Progress(total * cfg.batch, name, at * cfg.batch) as bar, Signals() as signals:
        while at < total:
            lr = lr_at(at, total, cfg.warmup * per_epoch, cfg.lr)
            with contextlib.nullcontext() if counter.get_total_flops() else counter:   # once
                losses = add_gradients(wrapped, step, data, cfg.accum, parts["scaler"],
                                       runtime.amp, seed, at, batches.per_epoch)
            update(parts["opt"], parts["scaler"], lr, cfg.clip)
            if cfg.ema:
                parts["average"].update_parameters(model)
            at, sums = at + 1, {k: sums.get(k, 0) + v for k, v in losses.items()}
            to_save = at % runtime.save_every == 0
            if to_save or at % runtime.log_every == 0 or at == total or size == 1 and signals.hit:
                seconds, since = seconds + time.perf_counter() - since, time.perf_counter()
                row = {"stage": name, "step": at, "epoch": round(at / per_epoch, 3), "lr": lr}
                bar.set_postfix_str(log_row(checkpoint, row, sums, at - logged), refresh=False)
                sums, logged = {}, at
                hit = any_rank(bool(signals.hit)) and at < total
                if hit or to_save and at < total:
                    keep(checkpoint, parts, at, seconds, key)
                if hit:
                    raise Interrupted(f"{name} stopped at step {at} of {total}; the same command "
                                      "goes on from here")
            bar.update(cfg.batch)
    if cfg.ema:
        model.load_state_dict(parts["average"].module.state_dict())
    model.eval()
    return {"images": total * cfg.batch, "seconds": round(seconds, 2),
            "gflops": counter.get_total_flops() * size / cfg.batch / 1e9}


# ---- the steps of the methods --------------------------------------------------------------------

def harden(x: Tensor, cfg: Robustify, generator: torch.Generator) -> Tensor:
    """x~: the images under the robust teacher's augmentation."""
    strength = (0.1, 0.3) if x.shape[-1] <= 64 else (0.375, 0.75)    # small detail drowns sooner
    return augment(x, cfg.augment, generator, augmix={"severity": cfg.severity},
                   pixmix={"pictures": cfg.pictures or None}, deepaugment={"strength": strength})


def plain_step(cfg: Train, aug: Robustify | None = None, n_classes: int = 0,
               clean: bool = True) -> Callable:
    """Cross-entropy of a whole network on x, or with aug on x and x~ alike (clean=False: on x~
    alone); aug.jsd: on x alone, and AugMix's consistency over three views.

    n_classes: mixup and cutmix of aug.augment mix images and labels first."""
    def step(model, batch):
        x, y, g, _ = batch
        if aug and n_classes and spec_names(aug.augment) & set(LABEL_MIXERS):
            x, y = mix_labels(x, y, aug.augment, g, n_classes)
        n_views = 0 if aug is None else 2 if aug.jsd and clean else 1
        z = model(torch.cat([x] * clean + [harden(x, aug, g) for _ in range(n_views)])).float()
        if n_views < 2:
            y = torch.cat([y] * (clean + n_views))
            return F.cross_entropy(z, y, label_smoothing=cfg.smoothing), {}
        z = z.chunk(3)
        ce, consistency = F.cross_entropy(z[0], y, label_smoothing=cfg.smoothing), jsd(*z)
        return ce + aug.jsd * consistency, {"ce": ce, "jsd": consistency}
    return step


def frozen_views(backbone: nn.Module, aug: Robustify | None = None, clean: bool = True,
                 original: nn.Module | None = None, teacher: nn.Module | None = None) -> Callable:
    """see(batch) -> [features of x, of x~], and with teachers their logits, the original's on x and
    the robust one's on x~: all that a step takes and does not change."""
    @torch.no_grad()
    def see(batch: Batch) -> list[Tensor]:
        views = [batch.x] * clean + ([harden(batch.x, aug, batch.generator)] if aug else [])
        f = backbone(torch.cat(views)).chunk(len(views))
        return [*f, original(f[0]), teacher(views[1])] if teacher else list(f)
    return see


def tail_step(cfg: Train, see: Callable) -> Callable:
    """Cross-entropy of a tail on frozen features, x and x~ alike."""
    def step(model, batch):
        f = see(batch)
        z, y = model(torch.cat(f)).float(), torch.cat([batch.y] * len(f))
        return F.cross_entropy(z, y, label_smoothing=cfg.smoothing), {}
    return step


def erpm_step(cfg: Distill, see: Callable) -> Callable:
    """METHOD [A]: one frozen pass of clean and augmented views, then the losses of eq. 3-5."""
    def step(model, batch):
        f, fa, z0, zt = see(batch)
        parts = erpm_loss(model(torch.cat([f, fa]), len(f)), z0, zt, batch.y, alpha=cfg.alpha,
                          t=cfg.temperature, smoothing=cfg.smoothing)
        return sum(parts.values()), parts
    return step


def attack(cfg: Robustify) -> dict:
    """The keywords of dad_samples."""
    return {k: getattr(cfg, k) for k in ("radius", "step", "steps", "start", "through")}


def dad_step(cfg: Robustify, teacher: nn.Module, vqgan: VQGAN | None, n_classes: int) -> Callable:
    """METHOD [B]: the student learns from the teacher on x, under cfg.augment, and on x', samples
    that come beside x or are made here; without a VQGAN from x alone (kd)."""
    def step(model, batch):
        (x, *others), y = (v.contiguous() for v in batch.x.split(3, 1)), batch.y
        if vqgan is not None and not others:
            draws = [rng("dad", *key) for key in batch.keys]
            others = [_bytes(255 * dad_samples(x, y, teacher, vqgan, draws, **attack(cfg)))]
        if spec_names(cfg.augment) & set(LABEL_MIXERS):
            x, y = mix_labels(x, y, cfg.augment, batch.generator, n_classes)
        views = torch.cat([harden(x, cfg, batch.generator), *others])
        with torch.no_grad():
            zt = teacher(views)
        parts = dad_loss(model(views), zt, y, cfg.temperature, cfg.smoothing)
        return sum(parts.values()), parts
    return step


def vqgan_step(model, batch):
    """Reconstruction (relative to the images' variance), codebook and commitment loss of a VQGAN
    (van den Oord et al. 2017).

    Half of the places skip the quantiser, so that the decoder asks for what no code tells yet (on
    shapes: colour); a code that nothing is nearest to moves to where the codes fit worst."""
    x = batch.x.float() / 255
    seen, z, q = model(x, free=0.5)
    parts = {"mse": F.mse_loss(seen, x) / x.var(), "codebook": F.mse_loss(q, z.detach()),
             "commitment": 0.25 * F.mse_loss(z, q.detach())}
    net = getattr(model, "module", model)
    used = net.nearest(z).flatten().bincount(minlength=len(net.codes)).clamp(max=1)
    if world()[1] > 1:
        dist.all_reduce(used)
    places, gap = (v.detach().float().permute(0, 2, 3, 1).flatten(0, 2) for v in (z, z - q))
    dead = (used == 0).nonzero()[:len(places), 0]
    net.codes.data[dead] = places[gap.square().sum(1).topk(len(dead)).indices]
    if world()[1] > 1:
        dist.broadcast(net.codes.data, 0)
    return sum(parts.values()), parts | {"codes used": (used > 0).float().mean()}


# ---- training from another project, without files ------------------------------------------------

def checked(section: str, **values) -> dict:
    """The values of a section's fields, or a UserError."""
    values = {k: typed(v, f"{section}.{k}", f"erpm.{section}()") for k, v in values.items()}
    check(Config(**{section: dataclasses.replace(PARTS[section], **values)}))
    spec_names(values.get("augment", "none"))
    return values


def robustify(net: nn.Module, images, *, augment: str = "pixmix+augmix", severity: float = 3.0,
              jsd: float = 0.0, seed: int = 0, crop: bool = True, flip: bool = True,
              **training) -> nn.Module:
    """The network, trained in place to be robust: cross-entropy on images and augmented images.

    images: an ImageSet, (x uint8 (n,3,S,S), y), or any sized data set of (uint8 image, label).
    net takes images as a Net does.  training: fields of Train (epochs, batch, lr, ...).
    Raises: UserError."""
    net = net if isinstance(net, Net) else Net(net)
    cfg = Robustify(**checked("robustify", augment=augment, severity=severity, jsd=jsd, **training))
    images = as_images(images).training(seed, crop, flip)
    step = plain_step(cfg, cfg, n_classes=len(images.classes))
    fit(net, step, images, cfg, Runtime(), name="robustify", seed=seed)
    return freeze(net)


def distill(student: Student, teacher: nn.Module, images, *, augment: str = "pixmix+augmix",
            severity: float = 3.0, alpha: float = 0.5, temperature: float = 2.0, seed: int = 0,
            crop: bool = True, flip: bool = True, **training) -> Student:
    """The Student, tuned in place by [A] eq. 5: its clean head learns from the original network,
    its robust head from the teacher.

    teacher: a robust network, images -> logits of the same classes.  images, training: as for
    robustify.  Raises: UserError."""
    teacher = freeze(teacher if isinstance(teacher, Net) else Net(teacher)).to(pick_device())
    cfg = Distill(**checked("distill", alpha=alpha, temperature=temperature, **training))
    aug = Robustify(**checked("robustify", augment=augment, severity=severity))
    student.to(pick_device())
    step = erpm_step(cfg, frozen_views(student.backbone, aug, True, student.original, teacher))
    images = as_images(images).training(seed, crop, flip)
    fit(student.tuned, step, images, cfg, Runtime(), name="distill", seed=seed)
    return student.eval()


# ==== 9. EVALUATION ====
# In: networks, a set.  Out: facts about every image, and of these a row a cell (network, set,
# corruption, severity).  Always: any number of processes gives the same figures.


@torch.no_grad()
def over(images: ImageSet, f: Callable, *, device: torch.device | None = None, batch: int = 256,
         workers: int = 0, bar: Progress | None = None) -> dict:
    """{name: float32 (n, ...)} of f(x, y, index) -> {name: tensor (B, ...)}, run on every batch of
    this rank's share, and put together in the set's order on every process.

    A batch holds the same images for any number of processes, so the facts agree to the last bit;
    nothing is padded or counted twice."""
    (rank, size), out, device = world(), {}, device or pick_device()
    starts = range(rank * batch, len(images), batch * size)
    lists = [[(0, p) for p in range(s, min(s + batch, len(images)))] for s in starts or [0]]
    for keys, (x, y, index) in zip(lists, loader(images, workers, batch_sampler=lists)):
        found = f(x.to(device, non_blocking=True), y.to(device, non_blocking=True), index)
        for k, v in found.items():
            if k not in out:
                out[k] = torch.zeros(len(images), *v.shape[1:])
            if starts:                           # a rank without a batch learns the shapes alone
                out[k][keys[0][1]:keys[-1][1] + 1] = v.float().cpu()
        if bar is not None:
            bar.update(len(keys) * size)
    for k, v in out.items() if size > 1 else ():
        v = v.to(pick_device())                  # every row is one rank's, 0 on the others: exact
        dist.all_reduce(v)
        out[k] = v.cpu()
    return {k: v.numpy() for k, v in out.items()}


def facts(v: Tensor, log_p: Tensor, y: Tensor) -> Tensor:
    """(B,4) float32 of each image: right, label among the first five, NLL in nats, confidence.

    Shapes: scores v (B,C), their log probabilities, labels y (B,).  Of equal scores the first class
    is before, as in argmax; topk would break ties differently on GPUs."""
    own, later = v.gather(-1, y[:, None]), torch.arange(v.shape[-1], device=v.device) > y[:, None]
    rank = v.shape[-1] - 1 - ((own > v) | (own == v) & later).sum(-1)         # NaN: before all
    nll = -log_p.gather(-1, y[:, None])[:, 0]
    return torch.stack([rank == 0, rank < 5, nll, log_p.amax(-1).exp()], 1)


def figures_of(v: np.ndarray, label: str) -> dict:
    """{"correct", "correct5", "nll", "ece"} of facts (n,4+), in float64, in one order.

    ECE: 15 bins of confidence, (lo, hi].  Source: Guo et al. 2017.
    Raises: UserError on outputs of NaN or inf."""
    bad = int((~np.isfinite(v)).any(1).sum())
    if bad:
        raise UserError(f"{label}: its outputs are not finite (NaN or inf) for {bad} of {len(v)} "
                        "images; try runtime.amp=none")
    edges = torch.linspace(0, 1, 16)[1:-1]
    at = torch.bucketize(torch.from_numpy(v[:, 3].copy()), edges).numpy()
    right, top5, nll, confidence = v[:, :4].astype(np.float64).T
    gap = np.bincount(at, right - confidence, 15)
    return {"correct": int(right.sum()), "correct5": int(top5.sum()),
            "nll": round(nll.mean(), 6), "ece": round(np.abs(gap).sum() / len(v), 6)}


CLOSED = "product (closed form)"


def student_facts(student: Student, x: Tensor, y: Tensor, ids: Tensor | None,
                  passes: int) -> dict:
    """{rule: facts and the head that answered (B,5)} and {"moments": sigma and KL (B,4)}, of the
    rules that need sigma only where there is live dropout."""
    f, out, live = student.features(x), {}, student.dropout > 0
    drawn = student.moments(f, passes, ids)
    closed = student.moments(f, 0, ids) if live and passes else None
    for name in [r for r in RULES if live or r not in NEEDS_SIGMA] + [CLOSED] * bool(closed):
        mean, sigma, logits = closed if name == CLOSED else drawn
        rule = "product" if name == CLOSED else name
        head = student.pick_head(mean, sigma, rule, logits=logits, y=y)
        p = answer(mean, sigma, head, rule).float()
        log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
        out[name] = torch.cat([facts(p, log_p, y), head[:, None]], 1)
    return out | {"moments": torch.cat([drawn[1], divergence(drawn[0])], 1).nan_to_num()}


def row_figures(model: Callable, found: dict, label: str) -> dict:
    """The figures of a network on a set, from its facts: of a Student for every rule."""
    if not isinstance(model, Student):
        return figures_of(found[""], label)
    means = found.pop("moments").mean(0, dtype=np.float64).round(6).tolist()
    rules = {rule: figures_of(v, label) | {
        "heads": np.bincount(v[:, 4].astype(int), minlength=3).tolist()}
        for rule, v in found.items()}
    return {"rules": rules, "sigma": means[:2], "kl": means[2:]}


def evaluate_all(models: dict[str, Callable], images: ImageSet, cell: tuple[str, int] | None = None,
                 *, passes: int = 10, jpeg: bool = True, frost_dir: str = "", amp: str = "auto",
                 **options) -> dict[str, dict]:
    """{label: figures} of several networks on the same pixels; see `evaluate`."""
    weights = (p for m in models.values() if isinstance(m, nn.Module) for p in m.parameters())
    device = next((p.device for p in weights), pick_device())

    def f(x, y, index):
        if cell:
            x = corrupt(x, *cell, index=index.tolist(), jpeg=jpeg, frost_dir=frost_dir or None)
        out = {}
        ask = functools.cache(lambda m, x: m(x))          # a member of teams runs once a batch
        with autocast(amp, device):
            for label, m in models.items():
                if isinstance(m, Student):
                    found = student_facts(m, x, y, images.ids, passes)
                else:
                    z = m(x, ask) if isinstance(m, Team) else ask(m, x)
                    z = project(z, images.ids).float()
                    found = {"": facts(z, z.log_softmax(-1), y)}
                out |= {(label, k): v for k, v in found.items()}
        return out

    found = over(images, f, device=device, **options)
    return {label: {"n": len(images), **row_figures(m, {
        k: v for (of, k), v in found.items() if of == label}, label or "the network")}
        for label, m in models.items()}


def aligned(images: ImageSet, card: Card) -> ImageSet:
    """The set with its classes looked up in a network's outputs, where these are the same classes
    in another order: a folder's are sorted by name."""
    if images.outputs == card.classes or set(images.outputs) != set(card.classes):
        return images
    ids = torch.tensor([[card.classes.index(c)] for c in images.classes])
    return dataclasses.replace(images, ids=ids, outputs=card.classes)


def evaluate(predict: Callable, images, cell: tuple[str, int] | None = None, **options) -> dict:
    """Figures of a network on a set, exact for any number of processes: {"n", "correct",
    "correct5" (counts), "nll" (mean, nats), "ece" (15 bins)}, of the classes that the set scores.

    predict: any function from images uint8 (B,3,H,W) to logits; or a Student, then {"n", "rules":
    {rule: the same figures and "heads", the images that clean, combined and robust answered},
    "sigma", "kl" (means, of the clean and the robust head)}.
    images: what as_images takes, or the name of a set in ./data; picture files are cut as the
    network wants them.  cell: (corruption, severity), made on the fly.
    options: batch, passes, jpeg, amp, workers.
    Raises: UserError, on outputs that are not finite too."""
    card = getattr(predict, "card", Card())
    images = open_set(images, view=card.view) if isinstance(images, str) else as_images(images)
    if hasattr(predict, "card") and images.images is None and not images.own_view:
        images = dataclasses.replace(images, view=card.view)
    if isinstance(predict, nn.Module):
        predict.eval()
    return evaluate_all({"": predict}, aligned(images, card), cell, **options)[""]


# ---- linear probes -------------------------------------------------------------------------------

PROBE_L2 = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)


def _fit_softmax(theta: Tensor, x: Tensor, y: Tensor, l2: float) -> Tensor:
    """The theta = (W | b) that minimises mean cross-entropy + l2/2 |W|^2, from a start, by L-BFGS;
    chunk by chunk, so that no (n,C) stands in memory.  Shapes: theta (C,D+1), x (n,D), y (n,)."""
    theta, rows = theta.clone().requires_grad_(), max(1, 2 ** 24 // len(theta))
    opt = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-10,
                            line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        opt.zero_grad()
        total = l2 / 2 * theta[:, :-1].square().sum()
        total.backward()
        for xs, ys in zip(x.split(rows), y.split(rows)):
            z = F.linear(xs, theta[:, :-1], theta[:, -1])
            part = F.cross_entropy(z, ys, reduction="sum") / len(y)
            part.backward()
            total = total.detach() + part.detach()
        return total

    with torch.enable_grad():
        opt.step(closure)
    return theta.detach()


def linear_probe(features: Tensor, y: Tensor, n_classes: int, *, seed: int = 0,
                 l2s: Sequence[float] = PROBE_L2) -> tuple[Tensor, Tensor, float]:
    """(weight (C,D), bias (C,), chosen l2) of a multinomial logistic regression on frozen features.

    It minimises mean cross-entropy + l2/2 |W|^2 on standardised features (the standardisation is
    then folded into weight and bias) by L-BFGS, full batch, in float64 on a CPU and float32 on a
    GPU.  l2: the one of l2s with the least loss on a tenth that is held out; refitted on all.
    Shapes: features (n,D) float32, labels y (n,)."""
    device = pick_device()
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    var, mean = torch.var_mean(features, 0, correction=0)
    std = torch.where(var > 1e-12, var, 1.0).sqrt()
    order = torch.from_numpy(np.random.default_rng(fold("probe", seed)).permutation(len(y)))
    x, y = ((features - mean) / std)[order].to(device, dtype), y[order].to(device)
    n, best = len(y) - len(y) // 10, (math.inf, l2s[0])
    theta = torch.zeros(n_classes, x.shape[1] + 1, device=device, dtype=dtype)
    for l2 in sorted(l2s, reverse=True) if len(l2s) > 1 and n < len(y) else ():
        theta = _fit_softmax(theta, x[:n], y[:n], l2)          # from strong to weak, warm starts
        loss = float(F.cross_entropy(F.linear(x[n:], theta[:, :-1], theta[:, -1]), y[n:]))
        say(f"linear probe: l2 = {l2:g}, loss on the held-out tenth {loss:.4f}")
        best = min(best, (loss, l2))
    theta = _fit_softmax(theta, x, y, best[1]).cpu()
    weight = theta[:, :-1] / std
    return weight.float(), (theta[:, -1] - weight @ mean.to(dtype)).float(), best[1]


def frozen_features(model: nn.Module, head: str = "clean") -> nn.Module:
    """What stands before the last linear layer, images -> (B,D), of a plain network or of one head
    of a Student: clean, combined, robust, or original (before tuning).

    It holds the model's own modules and freezes them.  Raises: UserError on what cannot be cut."""
    if isinstance(model, Net) and not model.card.n_classes:        # an encoder
        return freeze(model)
    if isinstance(model, Student):
        tail = [*model.original] if head == "original" else [
            *model.tuned.shared, *choose(dict(model.tuned.heads.items()), head, "head")]
        *body, last = [model.backbone, *tail]
    else:
        *body, last = stages(model)
    return freeze(nn.Sequential(*body, last.features))


def fit_probe(features: nn.Module, images: ImageSet, cfg: Config) -> nn.Linear:
    """The linear layer for the set's classes on what `features` makes of its images."""
    device = next(features.parameters()).device

    def f(x, y, index):
        with autocast(cfg.runtime.amp, device):
            return {"f": features(x)}

    with Progress(len(images), "linear probe: features") as bar:
        x = over(images, f, device=device, batch=cfg.eval.batch, workers=cfg.data.workers,
                 bar=bar)["f"]
    weight, bias, l2 = linear_probe(torch.from_numpy(x), torch.from_numpy(images.y[images.index]),
                                    len(images.classes), seed=cfg.seed)
    say(f"linear probe on {len(images):,} images of {images.name}: l2 = {l2:g}")
    fc = nn.Linear(weight.shape[1], len(weight))
    fc.load_state_dict({"weight": weight, "bias": bias})
    fc = fc.to(device)
    for p in fc.parameters() if world()[1] > 1 else ():     # equal to the last bit on all processes
        dist.broadcast(p.data, 0)
    return fc


# ---- rows ----------------------------------------------------------------------------------------

def weights_sha(net: nn.Module) -> str:
    """A hash of the network's tensors, but class embeddings of prompts, which change with the set.
    It is kept until a tensor is written to: a network is scored on many sets."""
    written = sum(t._version for t in (*net.parameters(), *net.buffers()))
    if getattr(net, "sha", (None,))[0] == written:
        return net.sha[1]
    texts = {f"{n}.weight" for n, m in net.named_modules() if isinstance(m, TextHead)}
    state = {k: v for k, v in net.state_dict().items() if k not in texts}
    net.sha = written, sha(state)
    return net.sha[1]


def weightless(model: nn.Module) -> nn.Module:
    """A copy on the meta device, which computes shapes and FLOPs alone."""
    bare = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    bare |= {id(b): b.to("meta") for b in model.buffers()}
    return copy.deepcopy(model, bare)


@torch.no_grad()
def gflops(model: nn.Module, size_px: int, passes: int = 0) -> float:
    """GFLOPs of an answer to an image, by torch's counter (2 a multiply-add; matrix products and
    convolutions alone).  passes: as in Student.predict."""
    model = freeze(weightless(model))
    x = torch.zeros(1, 3, size_px, size_px, device="meta")
    with FlopCounterMode(display=False) as counter:
        if isinstance(model, Student):
            model.moments(model.features(x), passes)
        else:
            model(x)
    return round(counter.get_total_flops() / 1e9, 6)


def kind_of(card: Card, images: ImageSet) -> str:
    """What a set is to a network: "home" = trained on, "part" = of home's classes, "shift" = the
    same classes otherwise, "transfer" = other classes.  A public network's home is ImageNet."""
    if images.base == (card.home or "imagenet") and not images.corrupted:
        return "home"
    if images.base == card.home or images.outputs == (card.classes or synsets()):
        return "part" if "@" in images.base else "shift"
    return "transfer"


def training_set(name: str, images: ImageSet, cfg: Config, view: View) -> ImageSet:
    """The training images of a set's classes, for a linear probe.  Raises: UserError."""
    home = name.replace("folder-c:", "folder:")
    if images.base in SETS:
        home = "imagenet" if SETS[images.base].part is not None else images.base.removesuffix("-r")
    try:
        return open_set(home, cfg.data, "train", view)
    except UserError as e:
        raise type(e)(f"{name}: its classes are not the network's outputs, and there are no "
                      f"training images for a linear probe: {e}") from None


def headed(label: str, model: nn.Module, name: str, images: ImageSet, cfg: Config,
           probes: dict) -> tuple[str, nn.Module]:
    """(label, network) that answers on a set: with its own head where its outputs are the set's
    classes, by prompts where it has a text tower, else by a linear probe on frozen features.

    Equal numbers of classes mean nothing: cifar10's are not fashion-mnist's.
    probes: those fitted so far.  Raises: UserError."""
    card, auto, trusted = model.card, cfg.eval.head == "auto", cfg.eval.head == "own"
    if isinstance(model, Team) and kind_of(card, images) == "transfer":
        raise Absent(f"{label} answers on the classes of {card.home} alone, not on {name}")
    own = images.base == card.home or bool(card.classes) and card.classes == images.outputs
    if auto and card.has_text:
        prompts = prompts_of(images, cfg.model.templates, cfg.data.names)
        return label if own else f"{label}, zero-shot", zero_shot(model, prompts, cfg.dir / "text")
    if trusted or auto and own:
        if card.n_classes != len(images.outputs):
            raise UserError(f"{label} has {card.n_classes} classes and {name} needs "
                            f"{len(images.outputs)}" + (f": {card.home} is not what it was when "
                            "the network was trained" if card.home else ""))
        return label, model
    train = training_set(name, images, cfg, card.view)
    key = label, train.base
    if key not in probes:
        try:
            features = frozen_features(model)
        except UserError as e:
            raise Absent(f"{name}: {label} needs a linear probe there: {e}") from None
        fc = fit_probe(features, train, cfg)
        probes[key] = freeze(nn.Sequential(features, Classifier(nn.Identity(), fc)))
        probes[key].card = dataclasses.replace(
            card, probe=f"clean head, {len(train):,} images of {train.base}")
    return f"{label}, linear probe", probes[key]


def identity(label: str, model: nn.Module, images: ImageSet, cfg: Config) -> dict:
    """The columns of a row that are known before it is computed, corruption and severity apart.

    "of" is a hash of everything that makes it another evaluation."""
    card, ev, transform = model.card, cfg.eval, images.transform
    if images.corrupted and not images.archive:
        transform += f", corrupted on the fly, jpeg 85, {frost_source()} frost"
    if card.size_px not in (0, images.view.size_px):
        transform += f", network {card.size_px} px"
    passes = ev.passes if isinstance(model, Student) else None
    amp = str(amp_type(cfg.runtime.amp, pick_device()))
    of = fold(label, weights_sha(model), card.prompts, card.probe, images.name, transform,
              len(images), cfg.seed, passes, amp, versions()["erpm"])
    return {"of": f"{of:016x}", "label": label, "seed": cfg.seed, "set": images.name,
            "kind": kind_of(card, images), "n": len(images), "transform": transform,
            "rule": ev.rule if isinstance(model, Student) else "", "passes": passes, "amp": amp,
            "gflops": gflops(model, images.view.size_px, ev.passes), "train": card.train,
            "source": images.source}


def read_rows(run: Path, rule: str = "") -> list[dict]:
    """The rows of a run's results.jsonl; rule: that of the headline figures, "" = each row's own.

    Raises: UserError on rows of another form."""
    path, rows = run / "results.jsonl", []
    for n, r in enumerate(read_jsonl(run / "results.jsonl", damaged=say), 1):
        if "sum" in r and r.pop("sum") != sha(json.dumps(r)):
            say(f"{path}: row {n} is damaged: eval makes it again")
        else:
            rows.append(r)
    if any(not {"of", "label", "seed", "set", "kind", "corruption", "severity"} <= set(r)
           for r in rows):
        raise UserError(f"{path} holds rows of another version of erpm.py: move it away and run "
                        "eval again")
    return [r | {"run": str(run)} | ({"rule": rule} if rule and r["rule"] else {}) for r in rows]


def done_cells(run: Path) -> set[tuple]:
    """(of, corruption, severity) of the rows that are there, as the first process sees them.  A
    last line that a crash left without its end is cut off: the next row would continue it."""
    box, file = [set()], run / "results.jsonl"
    if world()[0] == 0 and file.is_file():
        whole = file.read_text(errors="replace").rpartition("\n")
        if whole[2]:
            write_atomically(file, whole[0] + whole[1])
        box = [{(r["of"], r["corruption"], r["severity"]) for r in read_rows(run)}]
    if world()[1] > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def score_cell(models: dict[str, nn.Module], rows: dict[str, dict], images: ImageSet,
               cell: tuple[str, int], cfg: Config, bar: Progress) -> None:
    """Scores networks on a cell and appends their rows.  Raises: Interrupted after a signal."""
    ev, made, since = cfg.eval, images.corrupted and not images.archive, time.perf_counter()
    images = open_cell(images.base, cfg.data, *cell) if images.archive else images
    with Signals() as signals:
        found = evaluate_all(models, images, cell if made else None, passes=ev.passes,
                             amp=cfg.runtime.amp, batch=ev.batch, workers=cfg.data.workers, bar=bar)
        seconds = time.perf_counter() - since
        where = {"corruption": cell[0], "severity": cell[1], "seconds": round(seconds, 3),
                 "images_per_s": round(len(images) / seconds, 1), "processes": world()[1],
                 "device": pick_device().type, "packages": versions()}
        if world()[0] == 0:
            cfg.dir.mkdir(parents=True, exist_ok=True)
            with open(cfg.dir / "results.jsonl", "a") as f:
                for label, figures in found.items():
                    row = json.loads(json.dumps(rows[label] | where | figures))
                    f.write(json.dumps(row | {"sum": sha(json.dumps(row))}) + "\n")
        if any_rank(bool(signals.hit)):
            raise Interrupted("eval stopped after a whole cell; the same command goes on from here")


def score(models: dict[str, nn.Module], images: ImageSet, cfg: Config) -> set[str]:
    """Appends to the run's results.jsonl what is missing of the set, a row a network and cell, as
    soon as it is known.  Returns the "of" of what was asked."""
    if images.corrupted and not images.archive:
        images = images.subset(cfg.eval.n_cell)
    rows = {label: identity(label, m, images, cfg) for label, m in models.items()}
    done, todo = done_cells(cfg.dir), cells(images)
    with Progress(len(todo) * len(images), f"eval: {images.name}") as bar:
        for cell in todo:
            pending = {x: m for x, m in models.items() if (rows[x]["of"], *cell) not in done}
            if pending:
                score_cell(pending, rows, images, cell, cfg, bar)
            else:
                bar.update(len(images))
    return {row["of"] for row in rows.values()}


# ==== 10. REPORT ====
# In: rows of results.jsonl.  Out: Markdown and figures.  Always: a pure function of the rows (the
# picture grid alone looks at images); what is missing is called missing, never a smaller mean.

KINDS = ("home", "shift", "part", "transfer")
PAPER_SHIFTS = ("imagenet-c", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch",
                "objectnet", "objectnet-c")                              # [A] Tables 1 to 3
SAME_CLASSES = {"imagenet@a": "imagenet-a", "imagenet@r": "imagenet-r",
                "imagenet@objectnet": "objectnet"}
ALEXNET = dict(zip(CORRUPTIONS, (       # its errors, means of 5 severities (Hendrycks 2019)
    0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816, 0.826572,
    0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500)))
NAN = math.nan
KNOWN = {            # published, in percent: top-1 on imagenet, the mCE, top-1 on PAPER_SHIFTS[1:6]
    "timm:resnet50.tv_in1k": (76.13, 76.7, 63.21, 0.00, 36.17, 24.09, 35.75),
    "timm:resnet101.tv_in1k": (77.37, NAN, 65.45, 4.72, 39.31, 26.97, 38.38),
    "ResNet-50, DeepAugment+AugMix": (75.82, 53.6, 63.54, 3.88, 46.77, 32.62, 35.15),
    "ResNet-50, AugMix": (NAN, 65.3, NAN, NAN, NAN, NAN, NAN),
    "CLIP ViT-B/32, zero-shot": (63.30, NAN, 55.77, 31.39, 69.26, 42.37, 43.96)}
RIGHT_HEAD = {"home": 0, "part": 0, "shift": 2}          # index into HEADS, for [A] Table 6
# name: (a row and the figures of the rule that answers -> number, scale in the tables, format)
MEASURES: dict[str, tuple[Callable[[dict, dict], float], float, str]] = {
    "top-1": (lambda r, f: f["correct"] / r["n"], 100, ".2f"),
    "top-5": (lambda r, f: f["correct5"] / r["n"], 100, ".2f"),
    "NLL": (lambda r, f: f["nll"], 1, ".3f"),
    "ECE": (lambda r, f: f["ece"], 100, ".2f"),
    # all severities weigh alike, so the mean over the cells is the mCE
    "mCE": (lambda r, f: (1 - f["correct"] / r["n"]) / ALEXNET[r["corruption"]], 100, ".2f"),
    "clean": (lambda r, f: f["heads"][0] / r["n"], 100, ".2f"),
    "combined": (lambda r, f: f["heads"][1] / r["n"], 100, ".2f"),
    "robust": (lambda r, f: f["heads"][2] / r["n"], 100, ".2f"),
    "F": (lambda r, f: f["heads"][RIGHT_HEAD[r["kind"]]] / r["n"], 100, ".2f"),
    "sigma clean": (lambda r, f: r["sigma"][0], 1, ".4f"),
    "sigma robust": (lambda r, f: r["sigma"][1], 1, ".4f"),
    "KL clean": (lambda r, f: r["kl"][0], 1, ".4f"),
    "KL robust": (lambda r, f: r["kl"][1], 1, ".4f"),
    "training, s": (lambda r, f: r["train"]["seconds"], 1, ".0f"),
    "ms / training image": (
        lambda r, f: r["train"]["seconds"] / r["train"]["images"], 1000, ".2f"),
    "training GFLOPs / image": (lambda r, f: r["train"]["gflops"], 1, ".3g"),
    "GFLOPs": (lambda r, f: r["gflops"], 1, ".3g"),
    "time / FT": (lambda r, f: r["time / FT"], 1, ".2f"),              # see `relative`
    "training FLOPs / FT": (lambda r, f: r["training FLOPs / FT"], 1, ".2f"),
    "GFLOPs / original": (lambda r, f: r["GFLOPs / original"], 1, ".2f"),
    "images/s": (lambda r, f: r["images_per_s"], 1, ".0f"),
    "images a cell": (lambda r, f: r["n"], 1, ",.0f")}
COSTS = ("ms / training image", "time / FT", "training FLOPs / FT", "GFLOPs / original")
RULE_NAMES = {"oracle": "either head right", **{head: f"always {head}" for head in HEADS}}
PERFECT, APPENDIX = "perfect routing", "Every cell: "
BY_CORRUPTION = {c: {"corruption": c} for c in CORRUPTIONS}                 # lines of a pivot
BY_SEVERITY = {str(k): {"severity": k} for k in range(1, 6)}


def latest(rows: list[dict]) -> list[dict]:
    """One row a cell: of each (label, seed, set) those of the evaluation with the most images, of
    equal ones the newest.  Two never mix, not even where the newer one is not whole.
    Raises: UserError where two runs hold the same label and seed."""
    place, runs = operator.itemgetter("label", "seed", "set"), {}
    for r in rows:
        other = runs.setdefault((r["label"], r["seed"]), r["run"])
        if other != r["run"]:
            raise UserError(f"{other} and {r['run']} both hold {r['label']} of seed {r['seed']}: a "
                            "report averages over seeds; give it runs that differ in nothing else")
    last = {place(r): r["of"] for r in sorted(rows, key=operator.itemgetter("n"))}
    return list({(*place(r), r["corruption"], r["severity"]): r
                 for r in rows if r["of"] == last[place(r)]}.values())


def relative(rows: list[dict]) -> list[dict]:
    """The rows with their costs as shares of FT's and of the original's, of the same seed."""
    of = {(r["label"], r["seed"]): r for r in rows}
    out = []
    for r in rows:
        ft, plain, more = (*(of.get((x, r["seed"]), {}) for x in ("FT", "original")), {})
        if r["train"] and ft.get("train"):
            total = [v["images"] * v.get("gflops", NAN) for v in (r["train"], ft["train"])]
            more = {"time / FT": r["train"]["seconds"] / ft["train"]["seconds"],
                    "training FLOPs / FT": total[0] / total[1]}
        if "gflops" in r and "gflops" in plain:
            more["GFLOPs / original"] = r["gflops"] / plain["gflops"]
        out.append(r | more)
    return out


def plain(name: str) -> str:
    """A set's name without its qualification: imagenet-c (regenerated) -> imagenet-c."""
    return name.partition(" (")[0]


def sets_of(rows: list[dict], kind: str) -> list[str]:
    """The sets of a kind, the papers' shifts in their order; home to one model is home to all."""
    ranked = sorted(rows, key=lambda r: KINDS.index(r["kind"]), reverse=True)
    kinds = {r["set"]: r["kind"] for r in ranked}
    found = [s for s in dict.fromkeys(r["set"] for r in rows) if kinds[s] == kind]
    order = {name: i for i, name in enumerate(PAPER_SHIFTS)}
    return sorted(found, key=lambda s: order.get(plain(s), len(order)))


def corrupted(rows: Iterable[dict]) -> list[str]:
    """The -c sets."""
    return list(dict.fromkeys(r["set"] for r in rows if r["corruption"]))


def published(rows: list[dict]) -> list[dict]:
    """KNOWN as rows of the sets that were scored: in the tables they stand beside ours."""
    scored = {plain(s): s for kind in ("home", "shift") for s in sets_of(rows, kind)}
    return [{"label": f"{label} (published)", "seed": 0, "set": scored[s], "corruption": "",
             "severity": 0, "mCE" if s == "imagenet-c" else "top-1": percent / 100}
            for label, known in KNOWN.items()
            for s, percent in zip(("imagenet", *PAPER_SHIFTS), known) if s in scored]


def measured(row: dict, rule: str | None, measure: str) -> float:
    """A measure of a row, of a Student under a rule (by default the row's own); NaN where the row
    lacks what the measure looks for: it does not apply."""
    found = row
    if "rules" in row:
        if rule == PERFECT:
            rule = HEADS[RIGHT_HEAD.get(row["kind"], 0)]
        found = row["rules"].get(rule or row["rule"], {})
    try:
        return row[measure] if measure in row else MEASURES[measure][0](row, found)
    except KeyError:
        return NAN


def seed_means(rows: list[dict], *, label: str, sets: Sequence[str], rule: str | None = None,
               measure: str = "top-1", **where) -> list[float]:
    """A measure of a model, a number a seed: the mean over sets of the mean over a set's cells;
    [] when a cell is missing for a seed.  where: the rows that count, such as severity=3."""
    own = [r for r in rows if r["label"] == label]
    seeds, wide = dict.fromkeys(r["seed"] for r in own), corrupted(own)
    cells = (1 if "corruption" in where else len(CORRUPTIONS)) * (1 if "severity" in where else 5)
    found = {(seed, s): [] for seed in seeds for s in sets}
    for r in own:
        if r["set"] in sets and all(r[k] == v for k, v in where.items()):
            found[r["seed"], r["set"]].append(measured(r, rule, measure))
    if any(len(v) < (cells if s in wide else 1) for (_, s), v in found.items()):
        return []
    return [float(np.mean([np.mean(found[seed, s]) for s in sets])) for seed in seeds]


def cell(rows: list[dict], *, measure: str = "top-1", **what) -> str:
    """What stands in a table: "mean ± standard deviation" over the seeds, "missing", or "-"."""
    _, scale, form = MEASURES[measure]
    values = scale * np.array(seed_means(rows, measure=measure, **what))
    if not len(values):
        return "missing"
    if np.isnan(values).any():
        return "-"
    spread = f" ± {values.std(ddof=1):{form}}" if len(values) > 1 else ""
    return f"{values.mean():{form}}{spread}"


def markdown(head: Sequence, body: Sequence[Sequence]) -> str:
    """A Markdown table, columns aligned."""
    table = [[str(c) for c in line] for line in (head, *body)]
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |"
                     for line in table)


def pivot(rows: list[dict], title: str, lines: dict[str, dict], columns: dict[str, dict],
          note: str = "") -> str:
    """A titled Markdown table of `cell`s, each with the keywords of its column and of its line (a
    line wins); "" without lines or columns."""
    if not lines or not columns:
        return ""
    body = [[heading, *(cell(rows, **column | line) for column in columns.values())]
            for heading, line in lines.items()]
    return "\n\n".join(filter(None, (f"## {title}", note, markdown(["", *columns], body))))


def models(rows: list[dict], scored: Sequence[str], **more) -> dict[str, dict]:
    """Lines or columns of a pivot: the models that were scored on some of the sets."""
    return {r["label"]: {"label": r["label"], **more} for r in rows if r["set"] in scored}


def on(sets: Iterable[str]) -> dict[str, dict]:
    """Lines or columns of a pivot: the sets."""
    return {s: {"sets": (s,)} for s in sets}


def mean_on(sets: Sequence[str]) -> dict[str, dict]:
    """The column of a pivot for the mean over shifts, where there are several."""
    return {f"mean of {len(sets)} shifts": {"sets": sets}} if len(sets) > 1 else on(sets)


def severities(rows: list[dict], name: str) -> dict[str, dict]:
    """Lines of a pivot: the severities of a -c set, 0 = its clean set as the rows name it."""
    base = base_name(name)[0]
    clean = [r["set"] for r in rows if plain(r["set"]) == base] or [base]
    return {"0 (clean)": {"sets": clean[:1]}} | BY_SEVERITY


def main_tables(rows: list[dict]) -> list[str]:
    """[A] Tables 1 to 3: the models at home, under shift and on other classes."""
    home, shifts, parts, transfer = (sets_of(rows, kind) for kind in KINDS)
    known, first = rows + published(rows), home + shifts or parts or transfer
    cost = {m: {"sets": first[:1], "measure": m} for m in COSTS}
    mce = {s.replace("imagenet-c", "mCE"): {"sets": (s,), "measure": "mCE"}
           for s in shifts if plain(s) == "imagenet-c"}
    absent = [s for s in PAPER_SHIFTS if s not in map(plain, shifts)]
    note = ""
    if "imagenet" in map(plain, home):
        note = "Published figures are those of whole sets from disk. "
        note += f"No result for {', '.join(absent)}." if absent else ""
    same = []
    for part in parts:
        same += [part, *(s for s in shifts if plain(s) == SAME_CLASSES.get(plain(part)))]
    return [pivot(known, "Models", models(known, first), on(first) | cost),
            pivot(known, "Distribution shifts", models(known, shifts),
                  on(home) | mean_on(shifts) | on(shifts) | mce, note),
            pivot(rows, "Transfer", models(rows, transfer), on(transfer)),
            pivot(rows, "The same classes, clean and shifted", models(rows, same), on(same))]


def student_tables(rows: list[dict], label: str) -> list[str]:
    """[A] Tables 6 and 7: which rule picks the head of a Student, and what its heads do."""
    own = [r for r in rows if r["label"] == label]
    rules = {RULE_NAMES.get(rule, rule): {"label": label, "rule": rule}
             for rule in (*own[0]["rules"], PERFECT)}
    shifts = sets_of(own, "shift")
    places = on(sets_of(own, "home")) | mean_on(shifts)
    routed = {f"F {heading}": column | {"measure": "F"} for heading, column in places.items()}
    heads = on(dict.fromkeys(r["set"] for r in own if not r["corruption"]))
    for s in corrupted(own):
        heads |= {f"{s}, severity {k}": {"sets": (s,)} | at for k, at in BY_SEVERITY.items()}
    columns = (*HEADS, "F", "sigma clean", "sigma robust", "KL clean", "KL robust")
    return [pivot(own, f"{label}: which rule picks the head", rules, places | on(shifts) | routed,
                  "F = share of images sent to the right head: clean at home, robust under shift."),
            pivot(own, f"{label}: the heads ({own[0]['rule']})", heads,
                  {measure: {"label": label, "measure": measure} for measure in columns},
                  "Share of the images that each head answered; sigma of the clean and the robust "
                  "head and their KL divergence to the combined one, means over the images.")]


def corruption_tables(rows: list[dict], name: str) -> list[str]:
    """A -c set by corruption and by severity; imagenet-c also relative to AlexNet."""
    columns = models(rows, [name], sets=(name,))
    tables = [pivot(rows, f"{name} by corruption (mean of 5 severities)", BY_CORRUPTION, columns),
              pivot(rows, f"{name} by severity (mean of 15 corruptions)", severities(rows, name),
                    columns)]
    if plain(name) == "imagenet-c":
        tables.append(pivot(rows, f"{name}: error relative to AlexNet's",
                            BY_CORRUPTION | {"mCE": {}},
                            models(rows, [name], sets=(name,), measure="mCE"),
                            "In percent: 100 = as many errors as AlexNet."))
    return tables


def summary(rows: list[dict]) -> str:
    """The figures of every network on every set."""
    rows = latest(rows)
    lines = {f"{r['label']} on {r['set']}": {"label": r["label"], "sets": (r["set"],)}
             for r in rows}
    columns = ("top-1", "top-5", "NLL", "ECE", "images/s", "images a cell")
    return pivot(rows, "Every model on every set", lines, {m: {"measure": m} for m in columns},
                 "NLL in nats; ECE in percent, 15 bins; means over the cells of a -c set.")


def run_tables(rows: list[dict], tables: dict[str, list[str]]) -> list[str]:
    """The tables of compare.rows, {"title; note": models}."""
    home, shifts = sets_of(rows, "home"), sets_of(rows, "shift")
    columns = on(home) | mean_on(shifts) | on(shifts) | {
        m: {"sets": home[:1], "measure": m} for m in COSTS}
    return [pivot(rows, title.partition(";")[0], {x: {"label": x} for x in labels}, columns,
                  title.partition(";")[2].strip()) for title, labels in tables.items()]


def report_text(rows: list[dict], tables: dict[str, list[str]] = {}) -> str:
    """The whole report in Markdown, a pure function of the rows and the tables of compare.rows."""
    rows = relative(latest(rows))
    seeds, title = len({r["seed"] for r in rows}), sets_of(rows, "home") or ["Results"]
    spread = f"± = standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    parts = [f"# {', '.join(title)}",
             f"Top-1 accuracy in percent; mean over the cells of a -c set; {spread}.",
             *main_tables(rows), *run_tables(rows, tables)]
    for label in dict.fromkeys(r["label"] for r in rows if "rules" in r):
        parts += student_tables(rows, label)
    for name in corrupted(rows):
        parts += corruption_tables(rows, name)
    ways = dict.fromkeys(f"- {r['set']}: {'75 cells of ' if r['corruption'] else ''}{r['n']:,} "
                         f"images, {r['transform']}" for r in rows)
    parts += [summary(rows), "\n".join(["## Sets\n", *ways])]
    for name in corrupted(rows):
        for x, label in models(rows, [name], sets=(name,)).items():
            columns = {k: label | severity for k, severity in BY_SEVERITY.items()}
            parts.append(pivot(rows, f"{APPENDIX}{name}, {x}", BY_CORRUPTION, columns))
    return "\n\n".join(filter(None, parts)) + "\n"


# A method looks the same in the figures of every run (colours of Okabe & Ito, and two more)
STYLES = {"original": ("#000000", "s"), "teacher": ("#888888", "D"), "ERPM": ("#D55E00", "o"),
          "APT": ("#0072B2", "^"), "LP": ("#56B4E9", "v"), "FT": ("#009E73", "P"),
          "WiSE": ("#E69F00", "X"), "LP-FT": ("#CC79A7", "<"), "VPT": ("#8C6D31", ">"),
          "Team": ("#882255", "*")}


def styles(rows: list[dict]) -> dict[str, dict]:
    """{model: how it is drawn}; with the teacher beside it dashed and hollow, and so in turns are
    models that are no method."""
    looks = {x: {"color": c, "marker": m, "linestyle": "-"} for x, (c, m) in STYLES.items()}
    turns = {x: look | {"linestyle": "--", "markerfacecolor": "white"}
             for x, look in looks.items()}
    looks |= {f"{x} + teacher": look for x, look in turns.items()}
    others = [x for x in dict.fromkeys(r["label"] for r in rows) if x not in looks]
    return looks | dict(zip(others, itertools.cycle(turns.values())))


def panels(n: int, labels: Iterable[str]):
    """(figure, n axes side by side), with room for a legend of the labels on the right."""
    from matplotlib.figure import Figure
    width = 2.2 + 4.4 * n + 0.075 * max(map(len, labels))
    fig = Figure((width, 4.2), dpi=150, layout="constrained")
    axes = fig.subplots(1, n, squeeze=False, sharey=True)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#E5E5E5")
    return fig, axes


def severity_figure(rows: list[dict], names: Sequence[str]):
    """[A] Fig. 3: accuracy against severity, a panel a -c set; band = spread over the seeds."""
    looks, legend = styles(rows), {}
    fig, axes = panels(len(names), models(rows, names))
    for ax, name in zip(axes, names):
        for x in models(rows, [name]):
            found = [100 * np.array(seed_means(rows, label=x, **{"sets": (name,)} | at) or [NAN])
                     for at in severities(rows, name).values()]
            mean = np.array([v.mean() for v in found])
            spread = np.array([v.std(ddof=len(v) > 1) for v in found])
            legend[x], = ax.plot(range(6), mean, markersize=5, **looks[x])
            ax.fill_between(range(6), mean - spread, mean + spread, color=looks[x]["color"],
                            alpha=0.15, linewidth=0)
        ax.set(title=name, xlabel="severity (0 = clean)", xticks=range(6))
    axes[0].set_ylabel("top-1 accuracy, %")
    fig.legend(legend.values(), legend, loc="outside right center", frameon=False)
    return fig


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, gain) points that no other beats, the cheapest first."""
    return sorted(p for p in set(points)
                  if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points))


def pareto_figure(rows: list[dict], shifts: Sequence[str]):
    """[A] Fig. 1: mean accuracy over the shifts against training time, with the Pareto front."""
    points, looks = {}, styles(rows)
    fig, (ax,) = panels(1, models(rows, shifts))
    for x in models(rows, shifts):
        gain = 100 * np.array(seed_means(rows, label=x, sets=shifts))
        minutes = np.array(seed_means(rows, label=x, sets=shifts, measure="training, s")) / 60
        if np.isnan(minutes).any():
            ax.axhline(gain.mean(), color=looks[x]["color"], linestyle=":",
                       label=f"{x} (not trained)")
        elif len(gain):
            points[x] = float(minutes.mean()), float(gain.mean())
            ax.errorbar(*points[x], gain.std(ddof=len(gain) > 1), capsize=3, markersize=8,
                        label=x, **looks[x] | {"linestyle": ""})
    if points:
        ax.step(*zip(*pareto_front(points.values())), where="post", color="#999999", zorder=1,
                label="Pareto front")
        costs = [cost for cost, _ in points.values()]
        ax.set_xscale("log" if max(costs) > 15 * min(costs) else "linear")
        ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="training time of the model's own stage, minutes",
           ylabel=f"top-1 accuracy, %, {next(iter(mean_on(shifts)))}")
    fig.legend(loc="outside right center", frameon=False)
    return fig


def figures(rows: list[dict]) -> dict:
    """{file name: matplotlib figure}.  Raises: ImportError without matplotlib."""
    rows, found = latest(rows), {}
    names, shifts = corrupted(rows), sets_of(rows, "shift")
    if names:
        found["severity.png"] = severity_figure(rows, names)
    if any(r["set"] in shifts and r["train"] for r in rows):
        found["pareto.png"] = pareto_figure(rows, shifts)
    return found


@torch.no_grad()
def picture_grid(student, pictures: dict[str, tuple[Tensor, Tensor]], classes: Sequence[str],
                 passes: int, rule: str, columns: int = 8) -> Image.Image:
    """Sample pictures: the true class, and what each head said, green where it is right; > = the
    head that answered.  Shapes: pictures {heading: (x (k,3,H,W) uint8, y (k,))}."""
    side, line, font = 112, 15, ImageFont.load_default(12)
    left = 16 + int(max(map(font.getlength, pictures)))
    said = [font.getlength(f"> combined {name} 0.00") for name in classes]
    wide, tall = max(side, int(max(said))) + 16, side + 4 * line + 16
    sheet = Image.new("RGB", (left + columns * wide, len(pictures) * tall), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (heading, (x, y)) in enumerate(pictures.items()):
        x, y, top = x[:columns], y[:columns], row * tall + 6
        f = student.features(x.to(pick_device()))
        mean, sigma, logits = (m.cpu() for m in student.moments(f, passes))
        head = student.pick_head(mean, sigma, rule, logits=logits, y=y)
        pen.text((6, top + side // 2), heading, "black", font)
        for i in range(len(x)):
            at, below = left + i * wide, top + side + 2
            picture = Image.fromarray(x[i].permute(1, 2, 0).cpu().numpy())
            sheet.paste(picture.resize((side, side)), (at, top))
            pen.text((at, below), classes[y[i]], "black", font)
            for h, (p, k) in enumerate(zip(*mean[i].max(-1))):
                mark = ">" if h == head[i] else "  "
                pen.text((at, below + (h + 1) * line), f"{mark} {HEADS[h]} {classes[k]} {p:.2f}",
                         "darkgreen" if k == y[i] else "firebrick", font)
    return sheet


# ==== 11. BENCH ====
# In: nothing.  Out: rows of ours against what a user would pick instead: the same images, threads
# and settings, in turns within one run, so that a busy machine slows both alike.


def seconds(call: Callable) -> float:
    """How long the call takes, a GPU's work included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def paired(ours: Callable, theirs: Callable | None, n: int, n_theirs: int, rounds: int = 5) -> dict:
    """{"ours", "theirs", "ratio", "spread"}: median images/s and ratio over the rounds, and the
    least and largest ratio; None for theirs where there is no such package."""
    sides = [(ours, n), (theirs, n_theirs)] if theirs else [(ours, n)]
    rates = np.array([[images / seconds(call) for call, images in sides]
                      for _ in range(rounds + 1)])[1:]                # the first round warms up
    row = {"ours": np.median(rates[:, 0]).round(1).item(), "theirs": None, "ratio": None,
           "spread": None}
    if theirs:
        ratios = rates[:, 0] / rates[:, 1]
        row |= {"theirs": np.median(rates[:, 1]).round(1).item(),
                "ratio": np.median(ratios).round(2).item(),
                "spread": np.array([ratios.min(), ratios.max()]).round(2).tolist()}
    return row


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
    """Every corruption against the PyPI package imagecorruptions, where installed, and all of them
    as one: images/s of a sample that gets each once."""
    x, rows, package = bench_images(n, size), [], "imagecorruptions"
    pictures = [np.ascontiguousarray(i) for i in x[:8].permute(0, 2, 3, 1).numpy()]
    for name in CORRUPTIONS:
        few = pictures[:1] if name == "glass_blur" else pictures     # a Python loop over the pixels
        theirs = _if_it_runs(lambda: [
            importlib.import_module(package).corrupt(p, severity, name) for p in few])
        row = paired(lambda: corrupt(x, name, severity), theirs, n, len(few), 3)
        rows.append({"part": name, "against": package, **row})
    sums = {"the 15": rows[:], "the 14 without glass_blur": [
        r for r in rows if r["part"] != "glass_blur"]}
    for part, some in sums.items():
        row = {"part": part, "against": package, "theirs": None, "ratio": None, "spread": None}
        row["ours"] = round(len(some) / sum(1 / r["ours"] for r in some), 1)
        if all(r["theirs"] for r in some):
            row["theirs"] = round(len(some) / sum(1 / r["theirs"] for r in some), 1)
            row["ratio"] = round(row["ours"] / row["theirs"], 2)
        rows.append(row)
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


def training_steps(net: Net, teacher: Net, x: Tensor) -> dict[str, Callable]:
    """{method: a step of training} on images (B,3,S,S) and as many augmented ones, the augmentation
    itself left out: FT, ERPM with the last stage tuned in each head, and that from the cache."""
    device, copied = x.device, weightless if x.device.type == "meta" else copy.deepcopy
    student, teacher = (copied(m).to(device) for m in (Student(net, 1, 1), teacher))
    whole = copied(net).to(device).requires_grad_(True)
    see = frozen_views(student.backbone, Robustify(augment="none"), True, student.original, teacher)
    batch = Batch(x, torch.zeros(len(x), dtype=torch.long, device=device), rng(0))
    with autocast("auto", device):
        held = see(batch)

    def step(model: nn.Module, loss: Callable) -> Callable:
        opt = make_optimizer(model.train(), Train())

        def once() -> None:
            with autocast("auto", device):
                value = loss(model, batch)[0]
            value.backward()
            opt.step()
            opt.zero_grad()
        return once

    return {"FT": step(whole, plain_step(Train(), Robustify(augment="none"))),
            "ERPM": step(student.tuned, erpm_step(Distill(), see)),
            "ERPM, cached": step(student.tuned, erpm_step(Distill(), lambda batch: held))}


def bench_training(n: int = 8) -> list[dict]:
    """ERPM, live and from the cache, against FT: time of a step of ViT-S/16 with a ResNet-18
    teacher, and FLOPs of one of ViT-L/14 with a ViT-B/16 teacher, at 224 px."""
    rows, x = [], bench_images(n, 224).to(pick_device())
    make = lambda name: freeze(named(f"timm:{name}", 1000, "random", 224))
    steps = training_steps(make("vit_small_patch16_224"), make("resnet18"), x)
    for part in ("ERPM", "ERPM, cached"):
        row = paired(steps[part], steps["FT"], n, n)
        rows.append({"part": f"{part}, ViT-S/16", "against": "FT", **row})
    steps, counts = training_steps(make("vit_large_patch14_224"), make("vit_base_patch16_224"),
                                   x.to("meta")), {}
    for part, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step()
        counts[part] = counter.get_total_flops() / n
    for part in ("ERPM", "ERPM, cached"):
        rows.append({"part": f"{part}, ViT-L/14, GFLOPs", "against": "FT",
                     "ours": round(counts[part] / 1e9, 1), "theirs": round(counts["FT"] / 1e9, 1),
                     "ratio": round(counts["FT"] / counts[part], 2), "spread": None})
    return rows


def bench_answers(n: int = 32) -> list[dict]:
    """The choice of the head against the plain forward: ViT-S/16 at 224 px, last stage in each
    head; closed form, and 10 dropout passes in the heads or in the tail."""
    x, rows = bench_images(n, 224).to(pick_device()), []
    net = freeze(named("timm:vit_small_patch16_224", 1000, "random", 224)).to(x.device)
    for part, where, passes in (("closed form", "head", 0), ("10 passes in the heads", "head", 10),
                                ("10 passes in the tail", "tail", 10)):
        student = freeze(Student(net, 1, 1, dropout_in=where)).to(x.device)
        row = paired(lambda: student.predict(x, passes), lambda: net(x), n, n)
        share = gflops(student, 224, passes) / gflops(net, 224)
        rows.append({"part": f"{part} (FLOPs x {share:.2f})", "against": "the network", **row})
    return rows


BENCHES = {"corruptions": bench_corruptions, "augment": bench_augment,
           "training": bench_training, "answers": bench_answers}


# ==== 12. COMMANDS ====
# In: the command line.  Out: files under runs/NAME, a few lines on the terminal, an exit code:
# 0 done, 2 a mistake that the message explains, 130 or 143 stopped and ready to go on.


@contextlib.contextmanager
def alone(cfg: Config):
    """Context of the one command that works in the run's folder; the lock dies with its process.

    Raises: UserError while another one does; or where processes differ in settings or code."""
    import fcntl
    mine = sha(json.dumps(flat(cfg)), versions()["erpm"])
    others = [mine] * world()[1]
    if world()[1] > 1:
        dist.all_gather_object(others, mine)
    if set(others) != {mine}:
        raise UserError("the processes were started with different settings, or copies of erpm.py "
                        f"({', '.join(others)}): start them alike")
    cfg.dir.mkdir(parents=True, exist_ok=True)
    with open(cfg.dir / ".lock", "w") as file:
        try:
            if world()[0] == 0:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{cfg.dir}: another command is at work there: wait for it, or take "
                            "another run=NAME") from None
        yield


def write_config(cfg: Config) -> None:
    """runs/NAME/config.yaml: the resolved config."""
    if world()[0] == 0:
        text = yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False)
        write_atomically(cfg.dir / "config.yaml", f"# sha256 {sha(text)}\n{text}")


def training_images(cfg: Config) -> ImageSet:
    """The training images, in the student's own view, for which it is built without memory."""
    m, size = cfg.model, cfg.data.size_px
    card = read_card(m.student_weights) if m.student_weights else None
    with torch.device("cpu" if m.student.startswith("open_clip:") else "meta"):
        card = card or named(m.student, None, "random", size).card
    return open_set(cfg.data.name, cfg.data, "train", card.view)


CHECKS = [None, *((c, 3) for c in ("gaussian_noise", "defocus_blur", "fog", "contrast",
                                   "jpeg_compression"))]


def validate(label: str, net: nn.Module, cfg: Config) -> float:
    """Accuracy under five corruptions, told after every stage with that on clean test images (of up
    to 500); used for nothing but a warning.  NaN without test images."""
    try:
        images = open_set(cfg.data.name, cfg.data, view=net.card.view).subset(500)
    except UserError as e:
        say(f"{label}: no validation ({e})")
        return math.nan
    found = []
    for cell in CHECKS:
        row = evaluate_all({"": net.to(pick_device())}, images, cell, passes=cfg.eval.passes,
                           amp=cfg.runtime.amp, batch=cfg.eval.batch, workers=cfg.data.workers)[""]
        found.append((row["rules"][cfg.eval.rule] if "rules" in row else row)["correct"] / row["n"])
    clean, shifted = found[0], float(np.mean(found[1:]))
    say(f"{label}: {100 * clean:.1f} % of {len(images)} test images right, {100 * shifted:.1f} % "
        "under corruption")
    return shifted


DRAWN = ("name", "size_px", "fit", "crop", "flip", "n_train")       # of data: what an x depends on
HARDENED = ("augment", "severity", "pictures")                     # of robustify: and its x~


def stage(cfg: Config, name: str, file: str, label: str, images: ImageSet, inputs: dict,
          make: Callable, uses: str = "") -> nn.Module:
    """The network of runs/NAME/FILE.safetensors: kept if it is there, else made and saved.

    name: pretrain, robustify or distill.  make(train) -> (network, {"images", "seconds"}), where
    train is fit with this stage's settings.  inputs: what the result depends on beside the settings
    of data, seed and stage; uses: of the stage's settings those beyond Train's, "" = all.
    Raises: UserError when the file was made with other settings."""
    path, checkpoint = cfg.dir / f"{file}.safetensors", cfg.dir / f"{file}.ckpt"
    used = {f"data.{k}" for k in DRAWN} | {"seed"}
    kind = Train if uses else PARTS[name]
    used |= {f"{name}.{k}" for k in (*uses.split(), *(f.name for f in dataclasses.fields(kind)))}
    key = {k: v for k, v in flat(cfg).items() if k in used} | inputs
    if any_rank(path.is_file()):                     # all look before one writes
        changed = differences(getattr(read_card(path), "key", {}), key)
        if changed:
            raise UserError(f"{path} was made with other settings ({changed}): take another "
                            "run=NAME, or delete it to make it again")
        say(f"{name}: {path} is there, kept")
        return load(path)
    write_config(cfg)

    def train(module: nn.Module, step: Callable, some: ImageSet) -> dict:
        some = some.training(fold(cfg.seed, name), cfg.data.crop, cfg.data.flip)
        stats = fit(module, step, some, getattr(cfg, name), cfg.runtime, name=name, seed=cfg.seed,
                    checkpoint=checkpoint, key=key, workers=cfg.data.workers)
        cost = getattr(some, "cost", {"seconds": 0, "gflops": 0})        # of its cache
        return stats | {"seconds": round(stats["seconds"] + cost["seconds"], 2),
                        "gflops": stats["gflops"] + cost["gflops"] / stats["images"]}

    net, stats = make(train)
    if world()[0] == 0:
        save(path, net, size_px=net.card.size_px or images.view.size_px, view=images.view,
             classes=images.outputs, home=images.base, label=label, key=key, train=stats,
             fresh=False)
        for old in (checkpoint, checkpoint.with_suffix(".ckpt1")):
            old.unlink(missing_ok=True)
    any_rank(False)                                  # all wait for the file
    if any_rank(Signals.late):
        raise Interrupted(f"{name} is done; the same command goes on from here")
    net = load(path)
    say(f"{path}: {stats['images']:,} images in {stats['seconds']:.0f} s" if stats else
        f"{path}: as it comes")
    if not isinstance(net, VQGAN):
        net.robustness = validate(label, net, cfg)
    return net


# ---- the student and the teacher -----------------------------------------------------------------

def tail_of(net: Net, tune: int, norms: str = "frozen") -> tuple[Tuned, nn.Module]:
    """(the last stages and the classifier to be trained, the frozen rest); 0: the Linear alone."""
    backbone, tail = cut(net.to(pick_device()), tune)
    part = Tuned(tail.requires_grad_(True), norms)
    tail[-1].features.requires_grad_(tune > 0)
    return part, backbone


def train_clip(cfg: Config, images: ImageSet, train: Callable) -> tuple[nn.Module, dict]:
    """Trains both towers of an open_clip network by cross-entropy over the prompts of all
    classes."""
    import open_clip
    name, device = cfg.model.student, pick_device()
    clip = clip_model(name.partition(":")[2], "random", cfg.data.size_px)
    net = named(name, None, "random", cfg.data.size_px).to(device)       # it knows mean and std
    names, templates = prompts_of(images, cfg.model.templates, cfg.data.names)
    texts = open_clip.get_tokenizer(name.partition(":")[2])(
        [templates[0].replace("{}", c) for c in names]).to(device)

    def step(model, batch):
        h, t, scale = model(net.prepare(batch.x), texts)[:3]
        return F.cross_entropy((scale * h @ t.T).float(), batch.y,
                               label_smoothing=cfg.pretrain.smoothing), {}

    stats = train(clip, step, images.subset(cfg.pretrain.n_images))
    clip.card = dataclasses.replace(net.card, clip="both towers", n_classes=len(names),
                                    prompts=(names, templates))
    return clip, stats


def untrained(net: Net, images: ImageSet) -> bool:
    """Whether the classifier is not one for the classes of the set.  Equal numbers mean nothing:
    cifar10's classes are not fashion-mnist's."""
    return net.card.fresh or bool(net.card.known) and set(net.card.known) != set(images.outputs)


def student_net(cfg: Config, images: ImageSet, file: str = "student",
                label: str = "") -> nn.Module:
    """The network to be tuned -> student.safetensors: as its tag or file gives it where these have
    a classifier for the classes, or text, and else trained on clean data first."""
    m, t, size, weights = cfg.model, cfg.pretrain, cfg.data.size_px, cfg.model.student_weights
    prompts = prompts_of(images, m.templates, cfg.data.names) if m.head == "text" else ()
    inputs = {"model": m.student, "weights": weights and sha(Path(weights)),
              "head": m.head, "prompts": fold(prompts)}
    if m.head == "text" and not m.student.startswith("open_clip:"):
        raise UserError(f"model.head=text: {m.student} has no text tower; take open_clip:NAME")

    def make(train: Callable) -> tuple[nn.Module, dict]:
        torch.manual_seed(fold(cfg.seed, "init student"))
        if m.head == "text" and not weights and not has_tag(m.student):
            return train_clip(cfg, images, train)
        net = named(m.student, None if m.head == "text" else len(images.classes), weights or None,
                    size)
        if m.head == "text":
            net = zero_shot(net, prompts, cfg.dir / "text")
        if cfg.distill.method in ("erpm", "apt", "team") and not label:
            cut(net, cfg.distill.tune)        # what cannot be tuned says so before any training
            net.requires_grad_(True)
        some, since = images.subset(t.n_images), time.perf_counter()
        if m.head == "text" or not untrained(net, images):
            return net, {}
        say(f"{weights or m.student} has no classifier for these {len(images.classes)} classes: it "
            "is trained first")
        if t.tune < 0:
            return net, train(net, plain_step(t), some)
        if t.tune > 0:
            part, backbone = tail_of(net, t.tune)
            return net, train(part, tail_step(t, frozen_views(backbone)), some)
        fc = fit_probe(frozen_features(net.to(pick_device())), some, cfg)
        stages(net)[-1].fc.load_state_dict(fc.state_dict())
        return net, {"images": len(some), "seconds": round(time.perf_counter() - since, 2)}

    label = label or file.replace("student", "original")
    return stage(cfg, "pretrain", file, label, images, inputs, make)


def guide_net(cfg: Config, images: ImageSet) -> nn.Module:
    """[B]'s teacher of the small network, made as a student is -> guide-NAME.safetensors."""
    name, weights = cfg.robustify.teacher, cfg.robustify.teacher_weights
    if not name:
        return student_net(cfg, images)
    head = "text" if name.startswith("open_clip:") else "linear"
    own = changed(cfg, {"model.student": name, "model.student_weights": weights,
                        "model.head": head})
    return student_net(own, images, f"guide-{slug(name)}", name)


def trained_vqgan(cfg: Config, images: ImageSet) -> VQGAN:
    """The VQGAN of [B]: a file's, else trained on the images -> vqgan.safetensors."""
    v = cfg.vqgan
    if v.weights:
        return freeze(vqgan(v.name, v.weights))

    def make(train: Callable) -> tuple[nn.Module, dict]:
        torch.manual_seed(fold(cfg.seed, "init vqgan"))
        net = vqgan(v.name)
        return net, train(net, vqgan_step, images.subset(v.n_images))

    net = vqgan(v.name)
    return stage(cfg, "vqgan", "vqgan", "vqgan", images, {"config": str(net.card.vqgan)}, make)


def stored_samples(cfg: Config, images: ImageSet, teacher: nn.Module, vqgan: VQGAN) -> ImageSet:
    """The images with their samples of [B] beside them, files CLASS/INDEX.png; what is missing is
    made, shared by all processes.

    Raises: UserError where the folder has other ones; Interrupted."""
    r, top, (rank, size) = cfg.robustify, cfg.dir / cfg.robustify.samples, world()
    key = attack(r) | {"data": images.base, "transform": images.transform, "seed": cfg.seed,
                       "n": len(images.y), "teacher": weights_sha(teacher),
                       "prompts": fold(teacher.card.prompts), "vqgan": weights_sha(vqgan)}
    file = top / "samples.json"
    changed = differences(json.loads(file.read_text()) if file.is_file() else key, key)
    if changed:
        raise UserError(f"robustify.samples: {top} holds samples of other settings ({changed}): "
                        "take another folder")
    if rank == 0:
        write_atomically(file, json.dumps(key))
    paths = [str(top / slug(images.classes[k]) / f"{i:08d}.png") for i, k in enumerate(images.y)]
    missing = [k for k in range(rank, len(images), size)
               if not os.path.isfile(paths[images.index[k]])]
    with Progress(len(missing), "samples") as bar, Signals() as signals:
        n = max(1, r.batch // size)
        for at in range(0, len(missing), n):
            some = missing[at:at + n]
            x, y, index = images.__getitems__([(0, k) for k in some])
            draws = [rng("dad", cfg.seed, i) for i in index.tolist()]
            with autocast(cfg.runtime.amp, pick_device()):
                made = dad_samples(x.to(pick_device()), y.to(pick_device()), teacher, vqgan, draws,
                                   **attack(r))
            for i, picture in zip(index.tolist(), _bytes(255 * made).cpu()):
                picture = v2.functional.to_pil_image(picture)
                write_atomically(Path(paths[i]), lambda f: picture.save(f, "png"))
            bar.update(len(some))
            if signals.hit:
                raise Interrupted("samples stopped; the same command goes on from here")
    any_rank(False)                                  # all wait for the files
    beside = dataclasses.replace(images, images=None, paths=paths, border_px=0,
                                 view=View(images.view.size_px, 1.0))
    if images.images is not None:                    # small ones are held in memory as well
        held = torch.zeros(len(paths), 3, *[images.view.size_px] * 2, dtype=torch.uint8)
        for i in images.index:
            held[i] = v2.functional.pil_to_tensor(read_picture(paths[i]))
        beside = dataclasses.replace(beside, images=held, paths=())
    return dataclasses.replace(images, beside=beside)


def robust_teacher(cfg: Config, images: ImageSet, file: str = "teacher",
                   label: str = "") -> nn.Module:
    """The small robust network -> teacher.safetensors; robustify.method=none: as it comes."""
    m, r, guide, quantiser = cfg.model, cfg.robustify, None, None
    inputs = {"model": m.teacher, "view": str(images.view),
              "weights": m.teacher_weights and sha(Path(m.teacher_weights))}
    if r.method in ("kd", "dad"):
        guide = guide_net(cfg, images).to(pick_device())
        inputs |= {"guide": weights_sha(guide), "prompts": fold(guide.card.prompts)}
    if r.method == "dad":
        quantiser = trained_vqgan(cfg, images).to(pick_device())
        inputs["vqgan"] = weights_sha(quantiser)

    def make(train: Callable) -> tuple[nn.Module, dict]:
        torch.manual_seed(fold(cfg.seed, "init teacher"))
        net = named(m.teacher, len(images.classes), m.teacher_weights or None, cfg.data.size_px)
        some = images.subset(r.n_images)
        if quantiser and r.samples:
            some = stored_samples(cfg, some, guide, quantiser)
        if guide:
            return net, train(net, dad_step(r, guide, quantiser, len(images.classes)), some)
        if r.method != "none":
            step = plain_step(r, r, n_classes=len(images.classes), clean=r.clean)
            return net, train(net, step, some)
        if untrained(net, images):
            raise UserError(f"robustify.method=none: {m.teacher_weights or m.teacher} has no "
                            f"trained classifier for these {len(images.classes)} classes")
        return net, {}

    return stage(cfg, "robustify", file, label or file, images, inputs, make)


# ---- the cache of frozen views -------------------------------------------------------------------

class Rows(torch.utils.data.Dataset):
    """Rows (V,n,D) of V views in the place of images: epoch e shows view e mod V.

    cost: {seconds, gflops} of filling them."""

    def __init__(self, rows: Tensor, images: ImageSet, cost: dict):
        self.rows, self.images, self.cost = rows, images, cost

    def __len__(self) -> int:
        return len(self.images)

    def training(self, *_) -> Rows:
        return self

    def __getitems__(self, keys: Sequence[tuple[int, int]]):
        epochs, positions = torch.tensor(keys).T
        index = self.images.index[positions.numpy()]
        x = self.rows[epochs % len(self.rows), positions, :-1]
        return x, torch.from_numpy(self.images.y[index]), torch.from_numpy(index)


def fill(rows: Tensor, images: ImageSet, cfg: Config, rows_of: Callable) -> dict:
    """Writes the rows (V,n,D) that are not there yet, this process's share of them; a row ends with
    1 when it is written.  Returns {seconds, gflops}: what all cost.  Raises: Interrupted."""
    n, (rank, size), d = len(images), world(), cfg.distill
    todo = [[(v, k) for k in range(at, min(at + d.batch, n))]
            for v in range(d.views) for at in range(0, n, d.batch)][rank::size]
    todo = [keys for keys in todo if rows[keys[-1][0], keys[-1][1], -1] != 1]
    since, counter, left = time.perf_counter(), FlopCounterMode(display=False), sum(map(len, todo))
    with Progress(left, "views") as bar, Signals() as signals:
        for keys, batch in zip(todo, loader(images, cfg.data.workers, batch_sampler=todo)):
            with contextlib.nullcontext() if counter.get_total_flops() else counter:   # once
                found = rows_of(keys, batch)
            parts = [v.float().flatten(1).cpu() for v in found]
            new = torch.cat([*parts, torch.ones(len(keys), 1)], 1).to(rows.dtype)
            if not new.isfinite().all():
                raise UserError("distill.views: a feature is too large for half precision: take "
                                "runtime.amp=none, or distill.views=0")
            rows[keys[0][0], keys[0][1]:keys[-1][1] + 1] = new
            bar.update(len(keys))
            if signals.hit:
                raise Interrupted("views stopped; the same command goes on from here")
    flops = counter.get_total_flops() / len(todo[0]) if todo else 0
    return {"seconds": (time.perf_counter() - since) * d.views * n / max(1, left * size),
            "gflops": flops * d.views * n / 1e9}


def cached(cfg: Config, images: ImageSet, see: Callable, *frozen: nn.Module) \
        -> tuple[torch.utils.data.Dataset, Callable]:
    """(images, see) as they are, or with distill.views a file of what `see` gives for so many views
    of every image, filled once by all processes together, and what reads it.

    frozen: the networks that it depends on.  Half precision where networks run in it.
    Raises: UserError when the disk is too small or the file is damaged; Interrupted."""
    d, device = cfg.distill, pick_device()
    if not d.views:
        return images, see
    images = images.training(fold(cfg.seed, "distill"), cfg.data.crop, cfg.data.flip)

    def rows_of(keys: list, batch: tuple) -> list[Tensor]:
        with autocast(cfg.runtime.amp, device):
            return see(Batch(batch[0].to(device), batch[1], rng("view", cfg.seed, keys)))

    shapes = [v.shape[1:] for v in rows_of([], images.__getitems__([(0, 0)]))]
    widths = [math.prod(v) for v in shapes]
    dtype = torch.float16 if amp_type(cfg.runtime.amp, device) else torch.float32
    shape = (d.views, len(images), sum(widths) + 1)
    used = ("seed", *(f"data.{k}" for k in DRAWN), *(f"robustify.{k}" for k in HARDENED))
    key = [str(dtype), shape, d.method, d.tune, d.batch, [flat(cfg)[k] for k in used],
           [(weights_sha(net), getattr(net, "card", Card()).prompts) for net in frozen]]
    path, need = cfg.dir / f"views-{fold(key):016x}.bin", math.prod(shape) * dtype.itemsize
    seal = path.with_suffix(".sha")                  # hash and cost of the file, when it is filled
    say(f"{path}: {d.views} views of {len(images):,} images, {need / 1e9:.2f} GB")
    if world()[0] == 0:
        if not path.is_file():
            seal.unlink(missing_ok=True)
            if need > shutil.disk_usage(cfg.dir).free:
                raise UserError(f"distill.views: {path} takes {need / 1e9:.1f} GB, more than is "
                                "free there")
        torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype)
        if seal.is_file() and json.loads(seal.read_text())["sha"] != sha(path):
            raise UserError(f"{path} is damaged: delete it and {seal.name} to make it again")
    any_rank(False)                                  # all wait for the file
    rows = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    cost = fill(rows, images, cfg, rows_of)
    any_rank(False)                                  # all wait for all rows
    if world()[0] == 0 and not seal.is_file():
        write_atomically(seal, json.dumps({"sha": sha(path), **cost}))
    any_rank(False)

    def read(batch: Batch) -> list[Tensor]:
        return [v.unflatten(1, some) for v, some in zip(batch.x.float().split(widths, 1), shapes)]
    return Rows(rows, images, json.loads(seal.read_text())), read


# ---- the methods: (net, other, cfg, images, train) -> (network, {"images", "seconds"}) -----------

def tune_erpm(net, teacher, cfg, images, train):
    """[A]: three heads, distilled from the original network and the robust teacher."""
    d, device = cfg.distill, pick_device()
    student = Student(net, d.tune, d.head, d.dropout, dropout_in=d.dropout_in).to(device)
    student.tuned.norms, teacher = d.norms, freeze(teacher).to(device)
    see = frozen_views(student.backbone, cfg.robustify, True, student.original, teacher)
    images, see = cached(cfg, images, see, net, teacher)
    return student, train(student.tuned, erpm_step(d, see), images)


def tune_apt(net, _, cfg, images, train, tune: int | None = None):
    """The same part, one head, no teacher, on clean and augmented images; tune = 0: LP."""
    d = cfg.distill
    part, backbone = tail_of(net, d.tune if tune is None else tune, d.norms)
    images, see = cached(cfg, images, frozen_views(backbone, cfg.robustify), backbone)
    return net, train(part, tail_step(d, see), images)


def tune_ft(net, _, cfg, images, train):
    """The whole network, end to end, on clean and augmented images."""
    net.requires_grad_(True)
    aug = dataclasses.replace(cfg.robustify, jsd=0.0)     # as the others: cross-entropy on x and x~
    return net, train(net, plain_step(cfg.distill, aug), images)


def tune_lp_ft(lp, _, cfg, images, train):
    """FT that starts from LP; the costs of both count."""
    first = lp.card.train
    net, then = tune_ft(lp, _, cfg, images, train)
    flops = sum(s["images"] * s["gflops"] for s in (first, then))
    both = {k: first[k] + then[k] for k in ("images", "seconds")}
    return net, both | {"gflops": flops / both["images"]}


def tune_wise(tuned, original, cfg, images, train):
    """Weights between the original's and the fine-tuned network's: nothing is trained again."""
    tuned.load_state_dict(interpolate(original, tuned, cfg.distill.wise))
    return tuned, tuned.card.train


def tune_vpt(net, _, cfg, images, train):
    """Prompt tokens of a ViT and the classifier."""
    prompted(net, cfg.distill.prompts, cfg.distill.deep)
    for name, p in net.named_parameters():
        p.requires_grad_(name.endswith("prompt"))
    stages(net)[-1].fc.requires_grad_(True)
    aug = dataclasses.replace(cfg.robustify, jsd=0.0)
    return net, train(Tuned(net), plain_step(cfg.distill, aug), images)


def tune_team(net, teacher, cfg, images, train):
    """Ours: a second tail learns x~ alone, for the original and the teacher keep what they know;
    its BatchNorm takes statistics of its own."""
    device = pick_device()
    both = Team(net, freeze(teacher), cfg.distill.tune).to(device)
    see = frozen_views(both.net.backbone, cfg.robustify, clean=False)
    images, see = cached(cfg, images, see, both.net.backbone)
    return both, train(both.net.robust, tail_step(cfg.distill, see), images)


class Method(NamedTuple):
    """A row of METHODS.  start, beside: the networks that it takes, student and teacher or what
    another method makes; uses: settings of distill beyond those of Train that it depends on."""
    label: str
    tune: Callable
    start: str = "student"
    beside: str = ""
    uses: str = ""


METHODS = {
    "erpm": Method("ERPM", tune_erpm, "student", "teacher",
                   "tune head norms dropout dropout_in alpha temperature views"),
    "team": Method("Team", tune_team, "student", "teacher", "tune views"),
    "apt": Method("APT", tune_apt, uses="tune norms views"),
    "lp": Method("LP", functools.partial(tune_apt, tune=0), uses="views"),
    "ft": Method("FT", tune_ft),
    "lp-ft": Method("LP-FT", tune_lp_ft, "lp"),
    "wise": Method("WiSE", tune_wise, "ft", "student", "wise"),
    "vpt": Method("VPT", tune_vpt, uses="prompts deep"),
}


def tuned_model(cfg: Config, images: ImageSet, file: str = "model", label: str = "",
                names: dict[str, str] = {}) -> nn.Module:
    """The large network, tuned -> FILE.safetensors; what it is made from is made first.

    names: files of these, {role: file}, where not the role's name."""
    method, d = choose(METHODS, cfg.distill.method, "distill.method"), cfg.distill

    def made(role: str) -> nn.Module | None:
        if role in ("student", "teacher"):
            make = student_net if role == "student" else robust_teacher
            return make(cfg, images, names.get(role, role))
        file = names.get(role, role)
        return role and tuned_model(changed(cfg, {"distill.method": role}), images, file,
                                    "" if file == role else file, names)

    net, other = made(method.start), made(method.beside)
    inputs = {k: getattr(cfg.robustify, k) for k in HARDENED}
    inputs |= {"start": weights_sha(net), "beside": weights_sha(other) if other else "",
               "prompts": fold(net.card.prompts)}
    if method.beside == "teacher":
        ours, theirs = (n.robustness if hasattr(n, "robustness") else validate(n.card.label, n, cfg)
                        for n in (net, other))
        if theirs < ours:
            say(f"warning: the teacher is worse than the student under corruption, "
                f"{100 * theirs:.1f} against {100 * ours:.1f} %: it has little to teach; train it "
                "longer, start it from better weights (model.teacher_weights) or take another")
    return stage(cfg, "distill", file, label or method.label, images, inputs,
                 lambda train: method.tune(net, other, cfg, images.subset(d.n_images), train),
                 f"method {method.uses}")


# ---- eval ----------------------------------------------------------------------------------------

def networks_of_run(cfg: Config) -> dict[str, nn.Module]:
    """{label: network} of a run's folder: original, teacher, what was tuned, and each of them in a
    team with the teacher."""
    order = {"student": 0, "teacher": 1, "model": 3}
    files = sorted(cfg.dir.glob("*.safetensors"), key=lambda p: (order.get(p.stem, 2), p.stem))
    if not files:
        raise UserError(f"no trained network in {cfg.dir}: run `python erpm.py distill` first, or "
                        "name another run")
    nets = {p.stem: load(p).to(pick_device()) for p in files if p.stem != "vqgan"}
    teacher = nets.get("teacher")
    alone = [net for stem, net in nets.items()
             if teacher and not stem.startswith(("teacher", "guide")) and not isinstance(net, Team)
             and net.card.classes == teacher.card.classes]
    return {net.card.label: net for net in nets.values()} | {
        f"{net.card.label} + teacher": freeze(Team(net, teacher)) for net in alone}


def network_of_token(token: str) -> dict[str, nn.Module]:
    """{label: network} of [LABEL@]NAME[=WEIGHTS_FILE].  Raises: UserError."""
    front, _, path = token.partition("=")
    label, name = re.fullmatch(r"(?:([^:@]+)@)?(.*)", front).groups()
    if not path and not name.startswith("run:") and not has_tag(name):
        raise UserError(f"--model {name} has no weights: add a pretrained tag "
                        "(timm:resnet50.tv_in1k) or a file (NAME=WEIGHTS_FILE), or name what a run "
                        "made (run:runs/x)")
    net = build(name, weights=path or None)
    if not net.card.home and net.card.known == synsets():                # a public network's
        net.card = dataclasses.replace(net.card, home="imagenet", classes=synsets())
    return {label or token: freeze(net).to(pick_device())}


def set_names(cfg: Config) -> list[str]:
    """eval.sets, or the training set, its corrupted copy and its renditions."""
    name = cfg.data.name
    asked = [s.strip() for s in cfg.eval.sets.split(",") if s.strip()]
    if asked == ["all"]:
        return list(dict.fromkeys([*SETS, name, corrupted_name(name), "imagenet-c", "objectnet-c"]))
    return asked or [name, corrupted_name(name), *([f"{name}-r"] if f"{name}-r" in SETS else [])]


def score_all(nets: dict[str, nn.Module], cfg: Config) -> set[str]:
    """Scores networks on all sets; those that want the same pixels see them together.  Returns the
    "of" of what was asked.  Raises: UserError; under `all` what is absent is passed over."""
    asked, everything = set(), cfg.eval.sets.strip() == "all"
    for view in dict.fromkeys(net.card.view for net in nets.values()):
        alike = {label: net for label, net in nets.items() if net.card.view == view}
        opened, probes = {}, {}
        for name in set_names(cfg):                 # what is not there says so before any scoring
            try:
                opened[name] = open_set(name, cfg.data, view=view)
            except Absent as e:
                if not everything:
                    raise
                say(f"left out: {str(e).partition(':')[0]}")
        for name, images in opened.items():
            able, images = {}, aligned(images, next(iter(alike.values())).card)
            for label, net in alike.items():
                try:
                    able |= dict([headed(label, net, name, images, cfg, probes)])
                except UserError as e:
                    if len(alike) == 1 and not (everything and isinstance(e, Absent)):
                        raise
                    say(f"left out: {label}: {e}")
            if able:
                asked |= score(able, images, cfg)
    return asked


def run_eval(cfg: Config, args) -> None:
    """Scores a run's networks, or those of --model, on sets -> results.jsonl."""
    tokens = list(dict.fromkeys(filter(None, map(str.strip, cfg.eval.models.split(",")))))
    if tokens and not (cfg.dir / "config.yaml").is_file():
        write_config(cfg)                                # `report --run` looks for it
    asked = set() if tokens else score_all(networks_of_run(cfg), cfg)
    for token in tokens:                             # one by one: they may be large
        try:
            asked |= score_all(network_of_token(token), cfg)
        except UserError as e:
            raise type(e)(f"{token}: {e}; what is scored is kept") from None
    if world()[0] == 0:
        rows = [r for r in read_rows(cfg.dir, cfg.eval.rule) if r["of"] in asked]
        say(summary(rows) if rows else "nothing to score")
        say(f"results: {cfg.dir / 'results.jsonl'}; for tables and figures: report --run {cfg.dir}")


# ---- the other commands --------------------------------------------------------------------------

def pictures_of(rows: list[dict], cfg: Config, run: Path) -> Image.Image | None:
    """The picture grid of a run's Student, where its images are there."""
    student = load(run) if (run / "model.safetensors").is_file() else None
    if not isinstance(student, Student):
        return None
    student, pictures = student.to(pick_device()), {}
    for name in dict.fromkeys(r["set"] for r in rows if r["kind"] in ("home", "shift")
                              and not r["corruption"]):
        with contextlib.suppress(UserError):         # a set that is not there is not drawn
            images = open_set(name, cfg.data, view=student.card.view)
            picks = np.linspace(0, len(images) - 1, 8).astype(int)
            x, y, index = images.__getitems__([(0, int(p)) for p in picks])
            pictures[name] = x, y
            for c, _ in CHECKS[1:] if len(pictures) == 1 else ():
                pictures[f"{c} 4"] = corrupt(x, c, 4, index=index.tolist()), y
    if not pictures:
        return None
    return picture_grid(student, pictures, images.classes, cfg.eval.passes, cfg.eval.rule)


def run_report(cfg: Config, args) -> None:
    """results.jsonl of one or more runs -> report.md and pictures in the first one."""
    runs = [Path(r) for r in (args.run or str(cfg.dir)).split(",")]
    found = {run: read_rows(run, cfg.eval.rule) for run in runs}
    rows, empty = [r for some in found.values() for r in some], [r for r in runs if not found[r]]
    if empty:
        raise UserError(f"no results in {empty[0]}: run `python erpm.py eval` first")
    text, drawn = report_text(rows, cfg.compare.plan[0]), {}
    say(text.partition(f"\n## {APPENDIX}")[0])
    try:
        drawn = figures(rows)
    except ImportError:
        say("figures left out: matplotlib is not installed (pip install matplotlib)")
    for name, figure in drawn.items():
        write_atomically(runs[0] / name, lambda f: figure.savefig(f, format="png"))
        text += f"\n![{name}]({name})\n"
    grid = pictures_of(rows, cfg, runs[0])
    if grid:
        write_atomically(runs[0] / "pictures.png", lambda f: grid.save(f, "png"))
    write_atomically(runs[0] / "report.md", text)
    say(f"{runs[0]}: report.md, {', '.join([*drawn, *(['pictures.png'] if grid else [])])} written")


def run_compare(cfg: Config, args) -> None:
    """The recipe's own run and those of compare.rows, for every seed, then eval and report."""
    since, folders = time.perf_counter(), []
    for seed in range(cfg.seed, cfg.seed + cfg.compare.seeds):
        run = cfg.run + (f"-s{seed}" if seed != cfg.seed else "")
        own = changed(cfg, {"seed": seed, "run": run})
        for label, words in cfg.compare.plan[1].items():
            row, names = changed(own, words, label), {}
            for role in ("student", "teacher", *METHODS):     # a row with another one has its own
                sections = {"student": ("data.", "model.student", "pretrain."),
                            "teacher": ("data.", "model.teacher", "robustify.", "vqgan.")}.get(
                    role, ("data.", "model.", "pretrain.", "robustify.", "vqgan."))
                other = [f"{k.partition('.')[2]}={v}" for k, v in words.items()
                         if k.startswith(sections)]
                names[role] = slug("-".join([role, *other]))
            images = training_images(row)
            if row.distill.method == "none":
                robust_teacher(row, images, names["teacher"], label)
            else:
                tuned_model(row, images, slug(label.lower()) if words else "model", label, names)
        write_config(own)                                # not that of its last row
        run_eval(own, args)
        folders.append(str(own.dir))
    args.run = ",".join(folders)
    run_report(cfg, args)
    say(f"{args.command}: {time.perf_counter() - since:.0f} s in all")


def run_sets(cfg: Config, args) -> None:
    """The table of sets: what is there, what is expected, how to get it."""
    data = dataclasses.replace(cfg.data, allow_partial=True, n_train=0, n_test=0)
    mine = [n for n in (data.name, *cfg.eval.sets.split(",")) if FOLDER.fullmatch(n)]
    body, faults = [], []
    for name in (*mine, *SETS, *(f"{n}-c" for n, r in SETS.items() if r.archive)):
        row, (_, is_c) = SETS.get(base_name(name)[0]), base_name(name)
        found, where, classes, get, n = "-", "", "", "", "any"
        if row:
            where, classes, n = row.archive if is_c else row.test, row.n_classes, f"{row.n_test:,}"
            get = row.get.replace("ROOT", data.root).split("; -c: ")[-1 if is_c else 0]
        try:
            images = open_set(name, data)
            found, where, classes = f"{len(images.y):,}", images.source, len(images.classes)
        except UserError as e:
            found = "-" if isinstance(e, Absent) else "spoilt"
            faults += [] if isinstance(e, Absent) else [str(e)]
        body.append([name, found, n, classes, where, get])
    say(markdown(["set", "found", "expected", "classes", f"where (below {data.root})",
                  "how to get it"], body))
    say("\n".join(["NAME-c of any set is made on the fly where no archive of it is there (their "
                   "counts are of one of 75 cells)", *faults]))


def run_bench(cfg: Config, args) -> None:
    """Times our parts against the public ones -> bench.jsonl, and prints the ratios."""
    cfg.dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in args.paths or BENCHES:
        rows = choose(BENCHES, name, "bench")()
        with open(cfg.dir / "bench.jsonl", "a") as f:
            f.writelines(json.dumps({"bench": name, **r, "packages": versions()}) + "\n"
                         for r in rows)
        say(markdown(list(rows[0]), [list(r.values()) for r in rows]))


class CorruptCopies(torch.utils.data.Dataset):
    """Item k writes the missing copies of image k: OUT/corruption/severity/class/name."""

    def __init__(self, images: ImageSet, source: Path, out: Path):
        self.images, self.source, self.out = images, source, out

    def __getitem__(self, k: int) -> None:
        x, _, _ = self.images.__getitems__([(0, k)])
        file = Path(self.images.paths[k]).relative_to(self.source)
        kind = Image.registered_extensions()[file.suffix.lower()]
        for name, severity in cells(self.images):
            path = self.out / name / str(severity) / file
            if not path.is_file():
                y = corrupt(x, name, severity, index=[k])[0]
                picture = v2.functional.to_pil_image(y)
                write_atomically(path, lambda f: picture.save(f, kind, quality=85))


def run_corrupt(cfg: Config, args) -> None:
    """IN -> OUT in parallel; what is there already is kept."""
    if len(args.paths) != 2:
        raise UserError("corrupt takes two folders: corrupt IN OUT")
    source, out = map(Path, args.paths)
    paths = pictures_below(source)
    if not paths or out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"corrupt: no image below {source}" if not paths else
                        f"corrupt: {out} lies in {source}, take a folder beside it")
    view = View(cfg.data.size_px or 224, squash=cfg.data.fit == "squash")
    images = ImageSet(str(source), [0] * len(paths), ["-"], view, paths=paths, corrupted=True)
    jobs = CorruptCopies(images, source, out)
    share = range(world()[0], len(paths), world()[1])
    with Progress(len(share), "corrupt") as bar, Signals() as signals:
        for _ in loader(jobs, cfg.data.workers or os.cpu_count(), batch_size=None, sampler=share):
            bar.update(1)
            if signals.hit:
                raise Interrupted("corrupt stopped; the same command goes on from here")
    say(f"{out}: {len(paths):,} images x {len(cells(images))} cells")


COMMANDS: dict[str, tuple[Callable, str]] = {
    "demo": (run_compare, "pretrain, robustify, distill, baselines, eval and report in one go"),
    "pretrain": (student_net, "train a network on clean data"),
    "robustify": (robust_teacher, "make the small teacher robust"),
    "distill": (tuned_model, "tune the large network with three heads"),
    "eval": (run_eval, "score a run or a network on sets"),
    "compare": (run_compare, "every run of a table, methods, settings and seeds, and its report"),
    "report": (run_report, "tables and pictures of results"),
    "bench": (run_bench, "speed against the public code, as ratios: bench [corruptions] [augment]"),
    "corrupt": (run_corrupt, "corrupt IN OUT: the ImageNet-C-like copy of a folder"),
    "sets": (run_sets, "the data sets: found or not, how to get them"),
}
STAGES = ("pretrain", "robustify", "distill")
ON_ONE_PROCESS = ("report", "bench", "sets")
OPTIONS = {
    "--recipe": "recipe of config.yaml", "--config": "another file of recipes",
    "--run": "folder of the run; report: of several, joined by commas",
    "--set": "eval: sets, joined by commas, or all",
    "--model": "eval: networks instead of a run, joined by commas; see eval.models"}


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
    for option, text in OPTIONS.items():
        p.add_argument(option, default="", help=text)
    args = p.parse_intermixed_args(argv)
    args.paths = [w for w in args.words if "=" not in w and args.command in ("bench", "corrupt")]
    args.words = [w for w in args.words if w not in args.paths]
    args.words += [f"eval.sets={args.set}"] if args.set else []
    if args.model:                                       # the run's name gives way to one of words
        args.words = ["run=models", f"eval.models={args.model}"] + args.words
    return args


def configure(args: argparse.Namespace) -> Config:
    """The Config of the command: for eval and report the run's own, where it has one."""
    recipe, run = args.recipe or ("demo" if args.command == "demo" else ""), Path(args.run)
    if args.command == "report":
        run = Path(args.run.split(",")[0])
    words = args.words + ([f"out={run.parent}", f"run={run.name}"] if args.run else [])
    cfg = resolve(words, recipe, Path(args.config or RECIPE_FILE))
    if args.command not in ("eval", "report"):
        return cfg
    if (cfg.dir / "config.yaml").is_file():
        return dataclasses.replace(resolve(words, run=cfg.dir), out=cfg.out, run=cfg.run)
    if args.run:
        raise UserError(f"no run {run}: it has no config.yaml")
    return cfg


def preflight(cfg: Config, command: str) -> None:
    """Raises: UserError for what would stop a long job late."""
    m, r, method = cfg.model, cfg.robustify, cfg.distill.method
    choose(RULES, cfg.eval.rule, "rule")
    spec_names(r.augment)
    for name in set_names(cfg):
        set_row(name)
    if command not in ("demo", "compare", *STAGES):
        return
    check(cfg, world()[1])
    for file in (m.student_weights, m.teacher_weights, r.teacher_weights, cfg.vqgan.weights):
        if file and not Path(file).is_file():
            raise UserError(f"no file {file}")
    with torch.device("meta"):
        for name in {m.student, m.teacher, r.teacher} - {""}:
            if not name.startswith("open_clip:"):
                named(name, None, "random", cfg.data.size_px)
        if r.method == "dad":
            vqgan(cfg.vqgan.name)
    if command == "distill" and m.head == "text" and method in ("lp", "lp-ft"):
        raise UserError(f"distill.method={method}: with model.head=text the classes are prompts, "
                        "there is no linear layer to train")
    for label, words in cfg.compare.plan[1].items() if command in ("demo", "compare") else ():
        preflight(changed(cfg, words, f"compare.rows: {label}"), "distill")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    Signals.late = False
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(pick_device())
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        cfg = configure(args)
        preflight(cfg, args.command)
        writes = args.command not in (*ON_ONE_PROCESS, "corrupt")
        with alone(cfg) if writes else contextlib.nullcontext():
            if world()[0] == 0 or args.command not in ON_ONE_PROCESS:
                what = training_images(cfg) if args.command in STAGES else args
                COMMANDS[args.command][0](cfg, what)
        return 0
    except (UserError, OSError) as e:      # from a loader process it comes with its traceback
        text = " ".join(str(e).strip().split("UserError: ")[-1].split())
        print(f"erpm.py: {text}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as e:
        print(f"erpm.py: {e or 'interrupted'}", file=sys.stderr)
        return 128 + Signals.last
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
