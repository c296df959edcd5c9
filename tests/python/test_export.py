"""Files for C++: TorchScript and AOTInductor, and the programs of examples/cpp, which continue as Python does."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import elattn
from elattn._library import library_path
from elattn.errors import UserError
from elattn.models import ELATransformer, export_aoti, export_torchscript
from tiny_models import OPTIONS, model

pytestmark = pytest.mark.usefixtures("one_thread")

SERVED = ("plain", "decay-conv-gate", "hybrid", "softmax-conv-gate-gqa", "gated-experts", "lobe-residual-hybrid")
PROGRAMS = library_path().parent / "examples"
PROMPT = "Once upon a time"
NEW_TOKENS = 24

in_cpp = pytest.mark.skipif(not (PROGRAMS / "generate").exists(), reason=f"{PROGRAMS} has no examples: make examples")


def byte_model(name: str) -> ELATransformer:
    """An output layer of its own, because a tied one repeats the last token if nothing is trained."""
    return model(torch.float32, **(OPTIONS[name] | {"vocab_size": 256, "tie_embeddings": False}))


def ids_of(text: str) -> Tensor:
    return torch.tensor([list(text.encode())])


def continued(net: ELATransformer, prompt: str, **sampling: Any) -> list[int]:
    ids = ids_of(prompt)
    return net.generate(ids, NEW_TOKENS, **({"temperature": 0} | sampling))[0, ids.size(1) :].tolist()


def greedy(step: Any, state: list[Tensor], first: Tensor, count: int) -> list[list[int]]:
    """`count` tokens after `first` (B,), which is the token before them."""
    tokens = [first]
    for _ in range(count):
        tokens.append(step(tokens[-1], state).argmax(-1))
    return torch.stack(tokens[1:], 1).tolist()


def run(program: str, *arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [PROGRAMS / program, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=120)


def generated(*arguments: object, stdin: bytes = b"") -> bytes:
    done = run("generate", *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert b"tokens/s" in done.stderr
    assert done.stdout.endswith(b"\n")
    return done.stdout[:-1]


def as_ids(output: bytes) -> list[int]:
    return [int(token) for token in output.split(b",")]


def mistake(program: str, *arguments: object) -> str:
    """Runs what must fail with exit code 1 and one line, which is returned."""
    done = run(program, *arguments)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith(f"{program}: "), done
    return lines[0]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[ELATransformer, Path]:
    """A byte-level model with everything in it, and its TorchScript file."""
    torch.manual_seed(2)
    net = byte_model("lobe-residual-hybrid")
    path = tmp_path_factory.mktemp("served") / "model.pt"
    export_torchscript(net, path)
    return net, path


@pytest.fixture(scope="module")
def package(served: tuple[ELATransformer, Path]) -> Path:
    path = served[1].parent / "step.pt2"
    export_aoti(served[0], path)
    return path


# TorchScript


def test_torchscript_says_what_it_is(tmp_path: Path) -> None:
    net = model(torch.bfloat16, vocab_size=300)

    def facts(**options: Any) -> dict[str, str]:
        export_torchscript(net, tmp_path / "model.pt", **options)
        names = ("config.json", "vocab_size", "byte_level", "eos_id", "elattn_version", "fingerprint")
        found: dict[str, Any] = dict.fromkeys(names, "")
        torch.jit.load(tmp_path / "model.pt", _extra_files=found)
        return {name: value.decode() for name, value in found.items()}

    first = facts()
    assert first["config.json"] == net.config.to_json()
    assert (first["vocab_size"], first["byte_level"], first["eos_id"]) == ("300", "0", "")
    assert first["elattn_version"] == elattn.__version__
    second = facts(byte_level=True, eos_id=299)
    assert (second["byte_level"], second["eos_id"], second["fingerprint"]) == ("1", "299", first["fingerprint"])
    with torch.no_grad():
        net.embedding.weight[7, 3] += 1
    assert facts()["fingerprint"] != first["fingerprint"]


def test_exporting_changes_neither_the_model_nor_an_older_file_if_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = model(torch.float32).train()
    path = tmp_path / "model.pt"
    export_torchscript(net, path)
    assert net.training and all(parameter.requires_grad for parameter in net.parameters())
    before = path.read_bytes()

    def full(module: object, file: str, **options: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch.jit, "save", full)
    with pytest.raises(OSError, match="no space left"):
        export_torchscript(net, path)
    assert net.training
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"] and path.read_bytes() == before


# AOTInductor


def test_the_compiled_step_is_the_step(served: tuple[ELATransformer, Path], package: Path) -> None:
    net, _ = served
    assert sorted(p.name for p in package.parent.iterdir() if "pt2" in p.name) == ["step.pt2"]
    step = torch._inductor.aoti_load_package(str(package))
    with torch.no_grad():
        for batch, capacity in ((1, NEW_TOKENS), (3, 2 * NEW_TOKENS)):
            found, expected = net.new_state(batch, capacity), net.new_state(batch, capacity)
            for ids in torch.randint(256, (NEW_TOKENS, batch)):
                torch.testing.assert_close(step(ids, found), net.step(ids, expected), rtol=1e-4, atol=1e-5)
            for one, two in zip(found, expected, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_the_older_package_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step.pt2"
    path.write_bytes(b"older")
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        # What is found is remembered; forget it.
        monkeypatch.setattr(torch._inductor.cpp_builder, "cpp_compiler_search", _no_compiler)
        with pytest.raises(UserError, match=r"cannot be compiled \(InvalidCxxCompiler.*install g\+\+") as error:
            export_aoti(model(torch.float32), path)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step.pt2"] and path.read_bytes() == b"older"


def _no_compiler(search: object) -> str:
    raise torch._inductor.exc.InvalidCxxCompiler


# C++


@in_cpp
@pytest.mark.parametrize("name", SERVED)
def test_cpp_continues_as_python(name: str, tmp_path: Path) -> None:
    net = byte_model(name)
    file = tmp_path / "model.pt"
    export_torchscript(net, file)
    assert generated(file, PROMPT, NEW_TOKENS) == bytes(continued(net, PROMPT))
    sampled = continued(net, PROMPT, temperature=1.5, top_k=50, generator=torch.Generator().manual_seed(3))
    assert len(set(sampled)) > NEW_TOKENS // 2
    options = ("--temperature", 1.5, "--top-k", 50, "--seed", 3, "--threads", 2)
    assert generated(file, PROMPT, NEW_TOKENS, *options) == bytes(sampled)


@in_cpp
def test_cpp_takes_text_and_ids_from_anywhere(served: tuple[ELATransformer, Path]) -> None:
    net, file = served
    expected = continued(net, PROMPT)
    ids = ",".join(map(str, PROMPT.encode()))
    assert as_ids(generated(file, ids, NEW_TOKENS, "--ids")) == expected
    assert as_ids(generated(file, "-", NEW_TOKENS, "--ids", stdin=ids.replace(",", " \n").encode())) == expected
    assert generated(file, "-", NEW_TOKENS, stdin=PROMPT.encode()) == bytes(expected)
    assert generated(file, "größer", NEW_TOKENS) == bytes(continued(net, "größer"))
    assert generated(file, PROMPT, 0) == b""


@in_cpp
def test_cpp_stops_before_the_stop_token(served: tuple[ELATransformer, Path], tmp_path: Path) -> None:
    net, file = served
    expected = continued(net, PROMPT)
    stop = expected[-1]
    until = bytes(expected[: expected.index(stop)])
    assert generated(file, PROMPT, NEW_TOKENS, "--stop", stop) == until
    export_torchscript(net, tmp_path / "model.pt", eos_id=stop)
    assert generated(tmp_path / "model.pt", PROMPT, NEW_TOKENS) == until


@in_cpp
def test_cpp_prefills_long_prompts_in_pieces(served: tuple[ELATransformer, Path]) -> None:
    net, file = served
    prompt = (PROMPT * 300)[:4500]
    assert generated(file, "-", NEW_TOKENS, stdin=prompt.encode()) == bytes(continued(net, prompt))


@in_cpp
def test_cpp_runs_the_compiled_step(served: tuple[ELATransformer, Path], package: Path, tmp_path: Path) -> None:
    net, file = served
    assert generated(file, PROMPT, NEW_TOKENS, "--step", package) == bytes(continued(net, PROMPT))
    (tmp_path / "half.pt2").write_bytes(package.read_bytes()[:100_000])
    assert "is damaged" in mistake("generate", file, PROMPT, 3, "--step", tmp_path / "half.pt2")
    export_torchscript(byte_model("lobe-residual-hybrid"), tmp_path / "model.pt")
    assert "was made from another model" in mistake("generate", tmp_path / "model.pt", PROMPT, 3, "--step", package)


@in_cpp
def test_cpp_continues_a_batch_and_saves_its_state(served: tuple[ELATransformer, Path], tmp_path: Path) -> None:
    net, file = served
    prompts = (PROMPT, "The", "größer")
    done = run("batch", file, tmp_path / "state", *prompts)
    assert done.returncode == 0, done.stderr
    found = [as_ids(line) for line in done.stdout.splitlines()]
    assert found == [continued(net, prompt) for prompt in prompts]
    # The file is the state after half of the tokens; Python goes on with it.
    state = list(torch.load(tmp_path / "state"))
    half = NEW_TOKENS // 2
    token = torch.tensor([row[half] for row in found])
    assert greedy(net.step, state, token, half - 1) == [row[half + 1 :] for row in found]


@in_cpp
def test_mistakes_in_cpp_are_one_line(served: tuple[ELATransformer, Path], tmp_path: Path) -> None:
    _, file = served
    content = file.read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "other.pt"))
    export_torchscript(model(torch.float32, vocab_size=300), tmp_path / "subwords.pt")
    export_torchscript(byte_model("hybrid"), tmp_path / "small.pt")
    for arguments, message in [
        ((tmp_path / "none.pt", "a", 3), "none.pt is not a file"),
        ((tmp_path / "half.pt", "a", 3), "is not a TorchScript model, or is damaged"),
        ((tmp_path / "other.pt", "a", 3), "has no method new_state"),
        ((tmp_path / "subwords.pt", "a", 3), "its tokens are not bytes: use --ids"),
        ((tmp_path / "subwords.pt", "5,300", 3, "--ids"), "token 300 is not among the model's 300 tokens"),
        ((tmp_path / "small.pt", PROMPT, 60), r"at most max_seq_len = 40 (got 76)"),
        ((file, "", 3), "the prompt is empty"),
        ((file, "1,x", 3, "--ids"), "with --ids a token must be an integer >= 0 (got 'x')"),
        ((file, "a"), "needs MODEL, PROMPT and NUMBER_OF_TOKENS (got 2 words)"),
        ((file, "a", "many"), "NUMBER_OF_TOKENS must be an integer >= 0 (got 'many')"),
        ((file, "a", 3, "--beam", 2), "there is no option --beam"),
        ((file, "a", 3, "--top-k", 0), "--top-k must be an integer >= 1 (got '0')"),
        ((file, "a", 3, "--temperature", "nan"), "--temperature must be a number >= 0 (got 'nan')"),
        ((file, "a", 3, "--seed"), "--seed needs a value"),
        ((file, "a", 3, "--step", tmp_path / "none.pt2"), "none.pt2 is not a file"),
        ((file, "a", 3, "--step", file), "is not an AOTInductor package for this machine, or is damaged"),
    ]:
        line = mistake("generate", *arguments)
        assert message in line, line
