"""The cleaning of captions by the rules of DeepFloyd IF: patterns and what replaces them, in order.

cleaning.clean_caption("A photo of   a CAT")            # "a photo of a cat"
"""

import html
import re
import unicodedata
from html.entities import html5
from html.parser import HTMLParser
from urllib.parse import unquote_plus

SITE = r"[a-z\d.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/\-]*\b/?(?!@)"
FILE = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
ADDRESSES = [(rf"\b(?:{scheme}:(?:/{{1,3}}|[a-z\d%])|{SITE})", "") for scheme in ("https?", "www")]
SYMBOLS = (
    (r"@\w+", ""),  # account names
    ("[\u31c0-\u9fff]+", ""),  # Chinese characters, and signs of their neighbourhood
    ("[-֊־᐀᠆‐-―⸗⸚⸺⸻⹀〜〰゠︱︲﹘﹣－]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?|&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # 127.0.0.1
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # a backslash and an n
    # #12, #12345 and 123456, but not #1234, which may be a year
    (r"#(?:\d{1,3}|\d{5,})\b|\b\d{6,}\b", ""),
    (rf"\S+\.{FILE}", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}|[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
ENCODING = (  # what the package ftfy does to text that is not garbled
    ("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]", ""),
    ("[ĲĳŉǄ-ǌǱ-ǳﬀ-ﬆ\u3000\uff01-\uffef]", lambda found: unicodedata.normalize("NFKC", found[0])),
    ("[“-‟]", '"'),
    ("[ʼ‘-‛]", "'"),
)
SHOP = (
    # ab1234, ab12cd, 12ab34, and therefore 2x2
    (r"\b(?:[a-zA-Z]{1,3}\d{3,15}|[a-zA-Z]+\d+[a-zA-Z]+|\d+[a-zA-Z]+\d+)\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (rf"\bclick\b\s(?:for|on)\s\w+|\b{FILE}(?:\simages?)?|\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes: 20x30, with a Latin x, a Cyrillic one, a cross
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),  # a space after punctuation
    (r"\s+", " "),
    (r"""^["']([\w\W]+)["']$""", r"\1"),  # quotation marks around the whole; a lone one stays
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(text):
    """A caption as the released text models saw it in training: in lower case, without addresses,
    tags, account and file names, article numbers, symbols and words of web shops. Left out: text
    after 3,000 characters, and ftfy's repair of wrongly decoded text ("schÃ¶n")."""
    text = text[:3000]  # 120 tokens are some 600; the rules' time grows as a square
    for _ in range(2):  # the second pass finds what the first uncovered
        text = unquote_plus(text).strip().lower()  # + and %20 are spaces, as in addresses
        text = replaced(text.replace("<person>", "person"), ADDRESSES)
        text = replaced(without_tags(text), SYMBOLS)
        if len(re.findall("[-_]", text)) > 3:  # this-is-a-file-name; a jack-in-the-box is not
            text = re.sub("[-_]", " ", text)
        text = unicodedata.normalize("NFC", replaced(html.unescape(text), ENCODING))
        text = html.unescape(html.unescape(text)).strip()
        text = replaced(text, SHOP).strip()
    return text


def replaced(text, rules):
    """The text after all rules (pattern, replacement), one after the other."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def without_tags(text):
    """What a browser would show of a piece of HTML; "1 < 2" passes as it is."""
    shown = []

    def show_entity(name):
        shown.append(html5.get(f"{name};", f"&{name}"))  # &eacute; but not &me

    parser = HTMLParser(convert_charrefs=False)
    parser.handle_data = shown.append
    parser.handle_entityref = show_entity
    parser.handle_charref = lambda number: shown.append(html.unescape(f"&#{number};"))
    try:
        parser.feed(text)
        parser.close()  # hands over the rest: an unfinished tag is text
    except AssertionError:  # "<![": the official code raises an error, too
        return text
    return "".join(shown)
