"""What Sphinx lacks for this site: formulas as MathML, and a page for every public name."""

import inspect
import itertools
import re
import textwrap
from pathlib import Path

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxRole

import jaxlosses
import jaxlosses.flax

DISPLAY = re.compile(r"^( *)\$\$(.+?)\$\$", re.DOTALL | re.MULTILINE)
FUNCTION = re.compile(r"<m([io])>(log|tanh|max|min|exp)</m\1>(<mo stretchy=\"false\">&#x00028;)?")
BAR = '<mo stretchy="false">&#x0007C;</mo>'
LONG_NAME = re.compile(r'(?<=<span class="pre">)[^<]{20,}(?=</span>)|(?<=<h1>)[^<]+')
IMAGE = re.compile(r'<img [^>]*src="([^"]+)"[^>]*>')
INLINE = re.compile(r"(?<![\\$\w])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![$\w])")

GROUPS = {
    "Losses": "A loss takes predictions (or logits), labels and weights, in this order.\n",
    "Means, collectors and training": "What a training step needs around its losses.\n",
    "Flax": "For losses that are computed inside of a Flax module. Install ``jaxlosses[flax]``.\n"
    "With ``import jaxlosses.flax as jlf``, ``flax.capture`` is ``jlf.capture``.\n",
}


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the parts of this file to Sphinx."""
    app.add_html_math_renderer("mathml", (_inline_formula, None), (_formula, None))
    app.add_config_value("source_url", "", "env", str)
    app.add_role("source", Source())
    app.connect("builder-inited", write_reference)
    app.connect("doctree-read", _strip_code)
    app.connect("autodoc-process-signature", _hide_private)
    app.connect("html-page-context", _fit_a_phone)
    # Before napoleon, which reads the sections of a docstring.
    app.connect("autodoc-process-docstring", _mark_formulas, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


class Source(SphinxRole):
    """A link to a file of the repository: ``{source}`tests/test_tpu.py```."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """The link, if there is such a file."""
        if not (Path(self.env.srcdir).parent.parent / self.text).exists():
            message = self.inliner.reporter.error(f"there is no file {self.text}", line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, message)], [message]
        literal = nodes.literal("", self.text)
        return [nodes.reference("", "", literal, refuri=self.config.source_url + self.text)], []


def to_mathml(formula: str, display: str) -> str:
    """MathML of a formula in LaTeX, with the spaces that LaTeX has around functions and bars."""
    mathml = latex2mathml.converter.convert(" ".join(formula.split()), display=display)
    mathml = mathml.replace("<mi>:</mi>", '<mo lspace="0.28em" rspace="0.28em">:</mo>')
    forms = itertools.cycle(("prefix", "postfix"))
    mathml = re.sub(BAR, lambda match: f'{match[0][:3]} form="{next(forms)}"{match[0][3:]}', mathml)

    def function(match: re.Match) -> str:
        bracket = match[3] or ""
        space = "0" if bracket else "0.17em"
        return f'<mo lspace="0.17em" rspace="{space}">{match[2]}</mo>{bracket}'

    return FUNCTION.sub(function, mathml)


def _inline_formula(writer: nodes.NodeVisitor, node: nodes.math) -> None:
    writer.body.append(to_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _formula(writer: nodes.NodeVisitor, node: nodes.math_block) -> None:
    # Each equation by itself, so that a narrow page can have them in lines.
    equations = re.split(r"(?<=,)\s*\\quad", node.astext())
    mathml = "".join(to_mathml(equation, "block") for equation in equations)
    writer.body.append(f'<div class="formula">{mathml}</div>\n')
    raise nodes.SkipNode


def _mark_formulas(app, what, name, obj, options, lines: list[str]) -> None:
    """Write the formulas of a docstring, in dollars, as reStructuredText has them."""

    def directive(match: re.Match) -> str:
        indent = match[1]
        body = textwrap.indent(textwrap.dedent(match[2]).strip(), indent + "   ")
        return f"{indent}.. math::\n\n{body}\n"

    text = DISPLAY.sub(directive, "\n".join(lines))
    lines[:] = INLINE.sub(lambda match: f":math:`{match[1]}`", text).splitlines()


def _hide_private(app, what, name, obj, options, signature, returns):
    """Nothing public makes a class from private fields, or from arguments without names."""
    private = (signature or "").startswith(("(_", "(*args"))
    return ("()", returns) if what == "class" and private else None


def _fit_a_phone(app, pagename, templatename, context, doctree) -> None:
    """Let long names break between words. A picture links to itself, so that it can be enlarged."""

    def breakable(match: re.Match) -> str:
        return re.sub(r"(?<=\w)([_.(])(?=[A-Za-z])", r"\1<wbr>", match[0])

    if "body" in context:
        body = LONG_NAME.sub(breakable, context["body"])
        context["body"] = IMAGE.sub(r'<a href="\1">\g<0></a>', body)
    for link in filter(None, (context.get("prev"), context.get("next"))):
        link["title"] = link["title"].replace("_", "_<wbr>")


def _strip_code(app: Sphinx, doctree: nodes.document) -> None:
    """Do not show the empty line that ends the last output of a code block for doctest."""
    for block in doctree.findall(nodes.literal_block):
        if block.rawsource == block.astext():
            block.rawsource = block.rawsource.rstrip()
            block.children = [nodes.Text(block.rawsource)]


def public_names() -> dict[str, list[str]]:
    """Every public name, in groups; none can be forgotten, because none is written here."""
    groups = {group: [] for group in GROUPS}
    for name in jaxlosses.__all__:
        value = getattr(jaxlosses, name)
        if callable(value):
            is_loss = "reduction" in _parameters(value) or name == "weighted"
            groups["Losses" if is_loss else "Means, collectors and training"].append(name)
    groups["Flax"] = [
        f"flax.{name}"
        for name, value in sorted(vars(jaxlosses.flax).items())
        if not name.startswith("_") and getattr(value, "__module__", "") == "jaxlosses.flax"
    ]
    return groups


def _parameters(value: object) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(value).parameters)
    except ValueError:
        return ()


def write_reference(app: Sphinx) -> None:
    """Write a page for every public name, and the index of these pages, for this build."""
    folder = Path(app.srcdir) / "reference"
    folder.mkdir(exist_ok=True)
    pages = {"index.rst": _index()}
    for names in public_names().values():
        pages |= {f"{name}.rst": _page(name) for name in names}
    for path in folder.iterdir():
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:  # What is unchanged is not read again.
            path.write_text(text)


def _index() -> str:
    parts = [
        _title("Reference"),
        "Every public function and class, in groups. With ``import jaxlosses as jl``, the first\n"
        "one is ``jl.absolute_difference``. The `Conventions`_ below hold for every loss.\n",
    ]
    for group, names in public_names().items():
        rows = [f"   * - :obj:`{n} <jaxlosses.{n}>`\n     - {_summary(n)}\n" for n in names]
        links = "".join(f"   {name} <{name}>\n" for name in names)
        parts += [
            _title(group, "-"),
            GROUPS[group],
            f".. currentmodule:: {'jaxlosses.flax' if group == 'Flax' else 'jaxlosses'}\n",
            ".. list-table::\n   :widths: auto\n   :class: names\n\n" + "".join(rows),
            f".. toctree::\n   :hidden:\n   :caption: {group}\n\n" + links,
        ]
    return "\n".join([*parts, _title("Conventions", "-"), ".. automodule:: jaxlosses\n"])


def _page(name: str) -> str:
    module, _, attribute = f"jaxlosses.{name}".rpartition(".")
    value = getattr(jaxlosses.flax if module.endswith("flax") else jaxlosses, attribute)
    options = ""
    if inspect.isclass(value):
        # The docstring of a named tuple says what its fields are.
        hidden = getattr(value, "_fields", ())
        members = [n for n in vars(value) if not n.startswith(("_", "tree_")) and n not in hidden]
        documented = [n for n in members if getattr(vars(value)[n], "__doc__", None)]
        options = f"   :members: {', '.join(documented)}\n" if documented else ""
    kind = "autoclass" if inspect.isclass(value) else "autofunction"
    return f"{_title(attribute)}\n.. {kind}:: {module}.{attribute}\n{options}"


def _summary(name: str) -> str:
    """The first sentence of a docstring."""
    value = jaxlosses
    for part in name.split("."):
        value = getattr(value, part)
    return (inspect.getdoc(value) or "").partition("\n\n")[0].replace("\n", " ")


def _title(text: str, line: str = "=") -> str:
    return f"{text}\n{line * len(text)}\n"
