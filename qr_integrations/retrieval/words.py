"""What a word is, in all scripts."""

import regex

# Scripts that are written without spaces give one word per character; everywhere else a word keeps its accents.
_SPACELESS = r"[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}&&[\p{L}\p{N}]]"
_LETTER = rf"[[\p{{L}}\p{{N}}_]--{_SPACELESS}]"
_WITHIN = rf"(?:{_LETTER}|[\p{{M}}\u200c\u200d])"
WORD = regex.compile(rf"(?V1){_SPACELESS}[\p{{M}}\u200d]*|{_LETTER}{_WITHIN}*(?:['\u2019.\-]{_LETTER}{_WITHIN}*)*")
