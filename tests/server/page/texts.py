"""Answers with all that Markdown has."""

LESSON = """\
An **all-reduce** adds up what *all* ranks have, and gives all of them the sum; see
[the forum](https://www.mpi-forum.org/) and `MPI_Allreduce`:

1. Every rank brings a vector.
2. The vectors are added:
   - exactly, in `float64`,
   - in any order.
3. Every rank gets the **sum**.

```python
def all_reduce(comm, x):
    \"\"\"The sum over all ranks, on all of them.\"\"\"
    return comm.allreduce(x)  # two of them in every layer, one after attention and one after the feed-forward part
```

| ranks | share of each | messages |
|:------|:-------------:|---------:|
| 2     | half          | 2        |
| 4     | a quarter     | 8        |

> A llama never walks alone.
"""
RICH = """\
Setext
======

Mass is $E=mc^2$, H<sub>2</sub>O and 2<sup>10</sup>;&nbsp;also \\(a\\,b\\).

$$\\int_0^1 x^2\\,dx = \\frac{1}{3}$$

\\[ \\begin{aligned} a_1 &= b*c*d \\\\ &= \\sum_{i=1}^n i \\end{aligned} \\]

- [ ] to do
- [x] done, with a note[^1]

| Function | Description | Complexity | Notes |
|:---|:---:|---:|---|
| `sort_everything` | sorts<br>things | O(n log n) | a rather long note about what it does to the list |
| `find` | finds | O(n) | |

```c
int main(void) { return 0; } // the end, which is a long way to the right, beyond what any phone can show at once
```

> Press <kbd>Ctrl</kbd>+<kbd>C</kbd>.
> > Once.

[^1]: The note.
"""
