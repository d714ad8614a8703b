"""`save_config` and `load_config`: the settings of a network, scheduler or pipeline without its weights.

Source: diffusers `configuration_utils.py`.
"""

from pathlib import Path
from typing import Any, ClassVar

from joyedit.checkpoints.hub import Origin
from joyedit.checkpoints.json_files import read_json, write_json
from joyedit.checkpoints.option_spellings import check_saving
from joyedit.checkpoints.options import LoadOptions


class ConfigSpellings:
    """What has a JSON file of settings. `config_to_save` is its content."""

    config_name: ClassVar[str]  # the file

    def config_to_save(self) -> dict[str, Any]:
        raise NotImplementedError

    def save_config(self, save_directory: str | Path, **options: Any) -> None:
        """Write the settings alone. options: push_to_hub=False."""
        check_saving(options)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / self.config_name, self.config_to_save())

    @classmethod
    def load_config(
        cls, name_or_path: str | Path, *, subfolder: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """The settings of a folder, a Hub repository or a file, as `from_config` takes them.

        Options: revision, token, cache_dir, local_files_only, force_download. Raises FileNotFoundError when
        there is no such file.
        """
        parsed = LoadOptions.parse(options)
        if Path(name_or_path).is_file():
            return read_json(Path(name_or_path))
        origin = Origin(str(name_or_path), **parsed.origin)
        return read_json(origin.fetch_file(subfolder or "", cls.config_name, ()))
