#!/usr/bin/env python3
# Makes the files beside it: two by numpy itself, one with headers as MLX 0.32.2 writes them (mlx/io/load.cpp: a comma
# after each dimension, bfloat16 as V2, Fortran's order for whatever has but one).
import pathlib
import zipfile

import numpy as np

here = pathlib.Path(__file__).parent
arrays = {
    'a.weight': np.arange(6, dtype='<f4').reshape(2, 3),
    'b.weight': np.asfortranarray(np.arange(24, dtype='<u4').reshape(2, 3, 4)),
    'c': np.array([1, 2], dtype='<f2'),
    'd': np.array(7, dtype='<i8'),
    'e': np.zeros((0, 4), 'u1'),
}
np.savez(here / 'numpy.npz', **arrays)
np.savez_compressed(here / 'compressed.npz', **arrays)


def mlx(descr, fortran, shape, data):
    dims = ''.join(f'{dim}, ' for dim in shape)
    header = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': ({dims})}}".encode()
    header += b' ' * ((10 + len(header) + 1) % 16) + b'\n'
    return b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little') + header + data


members = {
    'layers.0.weight': mlx('<u4', False, (2, 8), bytes(range(64))),
    'layers.0.scales': mlx('<V2', False, (2, 2), b'\x80\x3f' * 4),
    'layers.0.biases': mlx('<V2', False, (2, 2), b'\x00\xbf' * 4),
    'norm.weight': mlx('<f2', True, (3,), bytes(6)),
    'x': mlx('|u1', True, (), b'\x05'),
}
with zipfile.ZipFile(here / 'mlx.npz', 'w') as archive:
    for name, data in members.items():
        with archive.open(name + '.npy', 'w') as file:
            file.write(data)
