from recipes.public_saes import ENTRIES, write
from saebench import paths

write(paths.CONTENT)
print(f"wrote {len(ENTRIES)} entries")
