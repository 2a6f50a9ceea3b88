"""`tokenize`: the ids and pieces of a text; needs no MPI."""

import json
import sys

from mpillama.cli.display import stages
from mpillama.cli.options import TokenizeOptions
from mpillama.cli.values import read_standard_input
from mpillama.loading.model_file import model_path, open_model
from mpillama.loading.texts import make_tokenizer


def tokenize(options: TokenizeOptions) -> int:
    display = stages(is_root=True, quiet=options.json)
    with display("building the tokenizer"):
        tokenizer = make_tokenizer(open_model(model_path(options.model), tokenizer=options.tokenizer))
    text = read_standard_input() if options.text == "-" else options.text
    with display("tokenizing the text"):
        ids = tokenizer.encode(text, parse_special=not options.literal)
    rows = [{"id": i, "piece": tokenizer.token_text(i)} for i in ids]
    if options.json:
        sys.stdout.write(json.dumps(rows, ensure_ascii=False) + "\n")
    else:
        sys.stdout.writelines(f"{row['id']:>8}  {row['piece']!r}\n" for row in rows)
    return 0
