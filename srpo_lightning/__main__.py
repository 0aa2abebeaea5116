import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel whenever it is imported

from srpo_lightning.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
