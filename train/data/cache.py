"""Where the Hugging Face libraries keep what they have made or fetched."""

import errno


def about_the_cache(error: BaseException) -> str:
    """Advice where the cache of the Hugging Face libraries cannot be written, else nothing.

    To be appended to the error's message.
    """
    # Imported here, as it takes a second that a tokenizer alone need not wait for.
    import datasets

    home, where = str(datasets.config.HF_CACHE_HOME), str(getattr(error, "filename", None) or "-")
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    if full or home.startswith(where) or where.startswith(home):
        return "; set HF_HOME to a folder that can be written and has room"
    return ""
