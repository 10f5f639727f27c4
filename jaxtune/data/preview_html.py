"""The page of `jaxtune preview --html`: one file without scripts, light or dark as the reader's system is.

Every text of the data is escaped, and nothing is fetched.
"""

from collections.abc import Iterator
from html import escape
from itertools import groupby

from jaxtune.data.preview import PAGE, Document, SeenRow, Token, visible

HUES = 6  # colours that documents of a row have in turn; those of the style sheet
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #70777f; --paper: #f6f7f9; --card: #fff; --line: #e1e4e8;
  --learnt: #d3f3dc; --learnt-ink: #0b5a2a; --edge: #8fd6a5; --chip: #eceff3; --shade: #0000001a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6ea; --dim: #8d96a0; --paper: #0f1215; --card: #171b20;
  --line: #2a3038; --learnt: #123d24; --learnt-ink: #9af0b8; --edge: #2b7a49; --chip: #252b33; --shade: #0008; } }
.h0 { --hue: #4f7df0 } .h1 { --hue: #e08a1e } .h2 { --hue: #b45bd6 }
.h3 { --hue: #1aa3a3 } .h4 { --hue: #dc4f6b } .h5 { --hue: #8a8f2a }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 6rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .75rem } h2 { font-size: 1.05rem; margin: 0 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 0 1rem; font-size: .9rem }
dt { color: var(--dim) } dd { margin: 0; overflow-wrap: anywhere }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.25rem; font-size: .85rem; color: var(--dim); margin: 0 0 2rem }
.row { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.25rem 1.25rem;
  margin: 0 0 1.5rem; box-shadow: 0 1px 3px var(--shade) }
.count { color: var(--dim); font-size: .9rem; margin: .1rem 0 .7rem }
.map { display: flex; height: 14px; border-radius: 4px; overflow: hidden; background: var(--chip) }
.map div { height: 100%; background: var(--hue); opacity: .45; min-width: 1px } .map .on { opacity: 1 }
.map .first { border-left: 2px solid var(--card) }
.map .pad { background: repeating-linear-gradient(45deg, var(--line) 0 4px, transparent 4px 8px); opacity: 1 }
.doc { border-left: 4px solid var(--hue); margin-top: 1.1rem; padding-left: .9rem }
.doc h3 { font-size: .85rem; font-weight: 600; margin: 0 0 .35rem; color: var(--dim) }
.doc h3 b { color: var(--hue) }
.text { font: 14px/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; color: var(--dim) }
.text i { font-style: normal; unicode-bidi: isolate; border-radius: 3px; padding: 1px 0;
  box-shadow: inset 1px 0 var(--line) }
i.on { background: var(--learnt); color: var(--learnt-ink); box-shadow: inset 1px 0 var(--edge) }
i.sp { background: var(--chip); font-size: .9em } i.sp.on { background: var(--learnt); outline: 1px solid var(--edge);
  outline-offset: -1px }
i.br { opacity: .75 } i.vt { background: var(--hue); color: var(--card); font-size: .8em }
i[data-t]:hover { outline: 2px solid var(--hue); outline-offset: 0; position: relative }
i[data-t]:hover::after { content: attr(data-t); position: fixed; left: 0; right: 0; bottom: 0; z-index: 1;
  padding: .7rem 1.25rem; background: var(--ink); color: var(--paper); font: 14px/1.4 ui-monospace, monospace;
  white-space: pre-wrap; text-align: center }
.padding { margin-top: 1.1rem; padding: .3rem .9rem; border-radius: 6px; color: var(--dim); font-size: .85rem;
  background: repeating-linear-gradient(45deg, var(--line) 0 4px, transparent 4px 8px) }
.padding span { background: var(--card); padding: 0 .4rem; border-radius: 3px }
"""


def page(rows: list[SeenRow], name: str, packs: bool, facts: dict[str, str]) -> str:
    """The whole page.

    name: what a document is called; packs: whether rows are packed as in a run; facts: what stands at the top.
    """
    told = "".join(f"<dt>{escape(key)}</dt><dd>{escape(visible(value))}</dd>" for key, value in facts.items())
    body = "\n".join(_row(row, name, packs) for row in rows)
    return (
        f"{PAGE}\n"
        f'<meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<style>{STYLE}</style></head>\n<body>'
        f"<h1>Rows as the model sees them</h1>\n<dl>{told}</dl>\n{_legend(name, packs)}\n{body}\n</body></html>\n"
    )


def _legend(name: str, packs: bool) -> str:
    words = [
        '<span class="text"><i class="on">answer</i></span> learnt: the loss is on this token',
        '<span class="text"><i>context</i></span> read, and not learnt',
        '<span class="text"><i class="sp">&lt;s&gt;</i></span> a special token',
        f"a coloured edge is a {escape(name)}, which sees nothing of the others" if packs else "",
        "the pointer on a token shows its id, place and target",
    ]
    return f'<div class="legend">{"".join(f"<span>{word}</span>" for word in words if word)}</div>'


def _row(row: SeenRow, name: str, packs: bool) -> str:
    """One card: numbers, a map of the row, and each document's tokens."""
    title, _, counts = row.caption(packs).partition(": ")
    number = None if packs else row.number
    documents = "\n".join(_document(part, part.title(name, number)) for part in row.documents)
    left = f'<div class="padding"><span>{row.padding:,} tokens of padding</span></div>' if packs and row.padding else ""
    return (
        f'<section class="row"><h2>{title}</h2><p class="count">{counts}</p>\n'
        f"{_map(row, packs)}\n{documents}\n{left}</section>"
    )


def _map(row: SeenRow, packs: bool) -> str:
    """The row as one bar: each document in its colour, strong where the loss is."""
    bars = [bar for document in row.documents for bar in _bars(document)]
    if packs and row.padding:
        bars.append(f'<div class="pad" style="flex:{row.padding}"></div>')
    return f'<div class="map">{"".join(bars)}</div>'


def _bars(document: Document) -> Iterator[str]:
    hue, first = _hue(document), " first" if document.start else ""
    for on, run in groupby(document.tokens, lambda token: token.supervised):
        yield f'<div class="{hue}{" on" if on else ""}{first}" style="flex:{len(list(run))}"></div>'
        first = ""


def _document(document: Document, title: str) -> str:
    counts = document.caption(title).removeprefix(f"{title}: ")
    names = {token.id: token.text for token in document.tokens}
    tokens = "".join(_token(token, document, names) for token in document.tokens)
    heading = f"<h3><b>{escape(title)}</b>: {counts}</h3>"
    return f'<div class="doc {_hue(document)}">{heading}\n<div class="text">{tokens}</div></div>'


def _token(token: Token, document: Document, names: dict[int, str]) -> str:
    """A token's text and, for the pointer, all that is known of it."""
    kinds = {"on": token.supervised, "sp": token.special, "vt": token.virtual, "br": "\n" in token.text}
    chosen = " ".join(kind for kind, applies in kinds.items() if applies)
    words = "▪" if token.virtual or not token.text else token.text
    shown = escape(visible(words)).replace("\n", "↵\n").replace("\t", "⇥\t")
    attribute = f' class="{chosen}"' if chosen else ""
    return f'<i{attribute} data-t="{escape(_hint(token, document, names))}">{shown}</i>'


def _hint(token: Token, document: Document, names: dict[int, str]) -> str:
    what = "virtual" if token.virtual else repr(token.text) if token.text else "begins a character that goes on"
    place = document.start + token.position - document.tokens[0].position
    where = f"position {token.position:,} · place {place:,} · segment {document.number}"
    learnt = "no target" if token.target is None else f"target {token.target} {names.get(token.target, '')!r}"
    return visible(f"{what} · id {token.id} · {where} · {learnt}")


def _hue(document: Document) -> str:
    return f"h{(document.number - 1) % HUES}"
