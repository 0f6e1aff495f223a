"""The main job on embedded data: several methods on a real encoder, compared, saved, reloaded and used."""
