"""Rules of the project that no single run shows."""

import ast
import importlib.metadata
import re
import subprocess
import sys

import pytest
from diffusers.optimization import SchedulerType
from packaging.requirements import Requirement
from packaging.version import Version

import pipeline_dopsd
import train_dopsd_full
import train_dopsd_lora
from conftest import ROOT


sys.path.insert(0, str(ROOT / "utils"))
import flags as flags_page  # noqa: E402
from fix_copies import definitions, with_copies  # noqa: E402


SCRIPTS = [ROOT / "train_dopsd_lora.py", ROOT / "train_dopsd_full.py"]
FILES = [*SCRIPTS, ROOT / "pipeline_dopsd.py"]
OPTIONAL = {"bitsandbytes", "prodigyopt", "torchao", "wandb"}  # imported inside functions, for flags that ask for them


def imports(path, top_level):
    """Names of the packages that a file imports at its top, or anywhere else in it."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    found = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    return found | {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}


def header(path):
    """PEP 723 block of a script as text."""
    found = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", path.read_text("utf-8"))
    assert found, f"{path.name} has no PEP 723 header"
    return found["content"]


def declared(path):
    """Distributions that the header of a script asks for, with those that these ask for themselves."""
    names = {re.match(r"[\w.-]+", d)[0] for d in re.findall(r'"([^"]+)"', header(path).split("dependencies")[1])}
    for name in list(names):
        requirements = [r for r in importlib.metadata.requires(name) or [] if "extra ==" not in r]
        names |= {re.match(r"[\w.-]+", r)[0] for r in requirements}
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def test_shared_functions_are_identical():
    """A bug that is mended in one script stays in the other where their common parts have drifted apart."""
    lora, full = (path.read_text("utf-8") for path in SCRIPTS)
    common = definitions(lora).keys() & definitions(full).keys()
    assert len(common) > 50 and with_copies(lora, full) == full, "run: make fix-copies"
    assert with_copies(lora.replace("def state_loss(", "def state_loss(changed, "), full) != full


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_scripts_import_packages_and_the_pipeline_alone(path):
    """Two copied files must run anywhere: no helper module of this repository is imported."""
    own = {p.stem for p in ROOT.rglob("*.py") if ".venv" not in p.parts} - {"pipeline_dopsd"}
    installed = importlib.metadata.packages_distributions()
    for name in imports(path, top_level=False) - set(sys.stdlib_module_names) - {"pipeline_dopsd"} - OPTIONAL:
        assert name in installed and name not in own, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_header_declares_what_is_imported(path):
    """`uv run` of the script installs what its header names; a package missing there ends in an ImportError."""
    assert 'requires-python = ">=3.11"' in header(path)
    installed = importlib.metadata.packages_distributions()
    needed = imports(path, top_level=True) | imports(ROOT / "pipeline_dopsd.py", top_level=True)
    for name in needed - set(sys.stdlib_module_names) - {"pipeline_dopsd"}:
        assert {d.lower().replace("_", "-") for d in installed[name]} & declared(path), f"{name} is not declared"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_versions_agree(path):
    """An old diffusers must be refused at the start, by the same bound everywhere."""
    checked = re.search(r'(?m)^check_min_version\("([\d.]+)"\)$', path.read_text("utf-8"))[1]
    assert f'"diffusers>={checked}"' in header(path)
    requirements = (ROOT / "requirements.txt").read_text().split()
    assert set(re.findall(r'"([^"]+)"', header(path).split("dependencies")[1])) <= set(requirements)
    assert "torchvision" not in " ".join(requirements)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bounds_can_be_met_together(path):
    """A bound below what another package asks for is a version that no user can install, and that no test has seen."""
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', header(path)))
    for name in bounds:
        for needed in map(Requirement, importlib.metadata.requires(name) or []):
            ours = bounds.get(needed.name.replace("-", "_"))
            if ours and not needed.marker:
                for other in (s.version for s in needed.specifier if s.operator == ">="):
                    assert Version(ours) >= Version(other), f"{name} asks for {needed}, the header for {ours}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize(("words", "code", "answer"), [("--help", 0, "usage: "), ("--rank 0", 2, "error: ")])
def test_mistakes_in_flags_are_told_before_the_imports(path, words, code, answer):
    """A user would wait ten seconds for a word about a misspelt flag."""
    code_of_run = f"import runpy, sys; sys.modules['torch'] = None; sys.argv[1:] = {words.split()}; runpy.run_path({str(path)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code_of_run], capture_output=True, text=True)
    assert done.returncode == code and (done.stdout + done.stderr).startswith(answer)


def test_schedulers_are_those_of_diffusers():
    """A scheduler that diffusers lacks would end a run after minutes of loading."""
    assert set(train_dopsd_lora.SCHEDULERS) == {s.value for s in SchedulerType} - {"piecewise_constant"}


def test_configs_name_no_folder_of_a_machine():
    """The names of somebody's folders would be published, and mean nothing anywhere else."""
    for path in (ROOT / "examples" / "miniature").rglob("*.json"):
        assert not re.search(r'": "/', path.read_text("utf-8")), path


def test_page_of_flags_is_that_of_the_scripts():
    """Users would read of flags and defaults that are gone. Remedy: make flags."""
    assert (ROOT / "docs" / "flags.md").read_text("utf-8") == flags_page.page()


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_pages_name_what_is_there(page):
    """A reader would be sent to a file, heading or flag that does not exist."""
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if not target.startswith("http"):
            other = page.parent / path if path else page
            assert other.exists(), target
            headings = re.findall(r"(?m)^#+ (.*)$", other.read_text("utf-8")) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, target
    known = set(
        re.findall(
            r"--\w+", "".join(file.read_text("utf-8") for file in [*SCRIPTS, *(ROOT / "examples").rglob("*.py")])
        )
    )
    outside = {
        "--num_machines",
        "--logdir",
        "--machine_rank",
        "--main_process_ip",
        "--main_process_port",
        "--config_file",
        "--help",
        "--include",
        "--recipe",
        "--gpu_gib",
    }
    assert set(re.findall(r"`[^`\n]*?(--\w+)", text)) - known - outside == set()
    if page.name == "README.md":
        assert len(text.splitlines()) <= 180


# where the prose names a default: file, text, flag and what the text says of it
DEFAULTS = [
    ("README.md", "1000 steps are the", "max_train_steps", 1000),
    ("README.md", "every third batch is drawn from 48 built-in prompts", "prior_every", 3),
    ("docs/training.md", "M (1), the states", "states_per_rollout", 1),
    ("docs/training.md", "every `--prior_every`th (3rd) batch", "prior_every", 3),
    ("docs/training.md", "weight of the loss on these batches (10)", "prior_loss_weight", 10),
    ("docs/training.md", "0.9999 keeps the teacher near the base", "ema_decay", 0.9999),
    ("docs/memory.md", "default M = 1, an image takes 4.5 passes in the mean at K = 4", "rollout_steps", 4),
    ("docs/full_fine_tuning.md", "every n = `--ema_refresh_steps` (10) steps", "ema_refresh_steps", 10),
    ("docs/full_fine_tuning.md", "`--states_per_rollout 1` (the default)", "states_per_rollout", 1),
]


@pytest.mark.parametrize(("file", "text", "flag", "value"), DEFAULTS, ids=lambda v: str(v)[:20])
def test_prose_names_the_defaults_of_the_scripts(file, text, flag, value):
    """A user reads one number and trains with another."""
    assert text in " ".join((ROOT / file).read_text("utf-8").split())
    words = ["--pretrained_model_name_or_path", "-", "--instance_data_dir", "-", "--output_dir", "-"]
    for script in (train_dopsd_lora, train_dopsd_full):
        assert getattr(script.parse_args(words), flag, value) == value
    assert len(pipeline_dopsd.PRIOR_PROMPTS) == 48
