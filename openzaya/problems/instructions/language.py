"""Which language a text is in, where the optional package ``langdetect`` is installed."""

from __future__ import annotations

from openzaya.errors import DataError

LANGUAGES: dict[str, tuple[str, str]] = {
    "de": ("German", "Am Morgen gehen wir gern durch den Wald und hören den Vögeln zu, bevor die Arbeit beginnt."),
    "en": ("English", "In the morning we like to walk through the forest and listen to the birds before work."),
    "es": ("Spanish", "Por la mañana nos gusta pasear por el bosque y escuchar los pájaros antes del trabajo."),
    "fi": ("Finnish", "Aamulla kävelemme mielellämme metsässä ja kuuntelemme lintuja ennen töiden alkua."),
    "fr": ("French", "Le matin, nous aimons marcher dans la forêt et écouter les oiseaux avant le travail."),
    "hi": ("Hindi", "सुबह हम जंगल में टहलना और काम शुरू होने से पहले पक्षियों को सुनना पसंद करते हैं।"),
    "it": ("Italian", "La mattina ci piace camminare nel bosco e ascoltare gli uccelli prima del lavoro."),
    "ja": ("Japanese", "朝は仕事の前に森を歩いて、鳥の声を聞くのが好きです。"),
    "ko": ("Korean", "아침에 우리는 일을 시작하기 전에 숲을 걸으며 새소리를 듣는 것을 좋아합니다."),
    "pl": ("Polish", "Rano lubimy spacerować po lesie i słuchać ptaków, zanim zacznie się praca."),
    "pt": ("Portuguese", "De manhã gostamos de caminhar pela floresta e ouvir os pássaros antes do trabalho."),
    "ru": ("Russian", "Утром мы любим гулять по лесу и слушать птиц, прежде чем начнётся работа."),
    "vi": ("Vietnamese", "Buổi sáng chúng tôi thích đi dạo trong rừng và nghe chim hót trước khi làm việc."),
}
"""Code to English name and a sample text."""

_MAX_CHARACTERS = 10_000
_MIN_ASCII_LETTERS = 0.9


def detected_language(text: str) -> str | None:
    """The ISO 639-1 code that ``langdetect`` finds, seeded, or None where the text tells nothing.

    Raises:
        DataError: ``langdetect`` is not installed.
    """
    try:
        import langdetect
    except ImportError:
        raise DataError(
            "language:response_language needs the package langdetect; install it (pip install langdetect) or leave "
            "these prompts out"
        ) from None
    langdetect.detector_factory.init_factory()
    detector = langdetect.detector_factory._factory.create()
    detector.seed = 0
    detector.append(text[:_MAX_CHARACTERS])
    try:
        found = detector.detect()
    except langdetect.LangDetectException:
        return None
    return None if found == "unknown" else found


def looks_english(text: str) -> bool:
    """Whether the text is English as ``langdetect`` finds; without it, whether nine letters in ten are ASCII."""
    try:
        return detected_language(text) in ("en", None)
    except DataError:
        letters = [sign for sign in text[:_MAX_CHARACTERS] if sign.isalpha()]
        return not letters or sum(sign.isascii() for sign in letters) >= _MIN_ASCII_LETTERS * len(letters)
