"""Formats that people have. Each is one file here, with its reader and its writer; adding one is one file and one line below.

=========  ==============================================================================================================
parquet    a folder with ``sequences.parquet`` (user_id, item_ids oldest first, [timestamps]) and ``items.parquet``
           (item_id, text columns, ``codes_*`` lists), [``Images/``]; carries all that a domain has
recbole    RecBole atomic files: a folder or a ``.inter`` file, with the ``.item`` file beside it if there is one
s3rec      S3-Rec text: one line a user, ``user item item ...``, oldest first
utgrec     the folder of UTGRec and MTGRec: ``all_item_seqs.json``, ``id_mapping.json``, ``metadata.sentence.json``,
           [``Images/``], [``*.sem_ids``]
lcrec      the folder of LC-Rec: ``NAME.inter.json``, ``NAME.item.json``, [``NAME.index.json``], [``NAME.user2id``, ``.item2id``]
=========  ==============================================================================================================
"""

from harness.data.formats import lcrec, parquet, recbole, s3rec, utgrec
from harness.data.formats.common import Format, Whole

FORMATS: dict[str, Format] = {
    "parquet": parquet.FORMAT,
    "recbole": recbole.FORMAT,
    "s3rec": s3rec.FORMAT,
    "utgrec": utgrec.FORMAT,
    "lcrec": lcrec.FORMAT,
}

__all__ = ["FORMATS", "Format", "Whole"]
