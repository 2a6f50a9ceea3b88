"""Ask a running `mpillama serve` with OpenAI's client, and print the answer as it arrives.

    pip install openai
    mpirun -n 4 python -m mpillama serve --rendezvous server.json &
    python examples/chat_client.py server.json "Tell me a story about a llama."

The server writes its rendezvous file when the model is loaded: the URL, and the key if it has one.
"""

import json
import sys
import time
from pathlib import Path

from openai import OpenAI

path, question = Path(sys.argv[1]), " ".join(sys.argv[2:]) or "Tell me a story about a llama."
while not path.exists():
    time.sleep(0.5)
server = json.loads(path.read_text())
client = OpenAI(base_url=server["url"] + "/v1", api_key=server["key"] or "none")
stream = client.chat.completions.create(
    model=server["model"],
    messages=[{"role": "user", "content": question}],
    max_tokens=100,
    seed=1,  # the same answer on any number of ranks
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
