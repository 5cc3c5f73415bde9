package spawn

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A fork copies what the process has touched: the page tables at once, and each
// page when it is written next, here or there. Of all that the child needs only
// what it reads between clone and execve. That lies in a box, a mapping of its
// own, and the heap is kept out of forks (excludeHeap): a fork then is as cheap
// as one of a small program, and the child has no copy of what the agent knows.
type box struct {
	mem  []byte
	used uintptr
}

// stackSize is the child's stack, far more than functions that must not grow it
// can use.
const stackSize = 32 << 10

// newBox maps a box with room for n bytes beside the stack. Only what is used
// of it costs memory.
func newBox(n int) (*box, error) {
	mem, err := unix.Mmap(-1, 0, n+stackSize, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("spawn: memory of the child: %w", err)
	}
	return &box{mem: mem}, nil
}

// free gives it back here; a child's copy stays.
func (b *box) free() { _ = unix.Munmap(b.mem) }

// take returns the next n bytes, aligned for any type.
func (b *box) take(n uintptr) (unsafe.Pointer, error) {
	at := (b.used + 15) &^ 15
	if n > uintptr(len(b.mem)) || at > uintptr(len(b.mem))-n {
		return nil, fmt.Errorf("spawn: memory of the child: %w", unix.E2BIG)
	}
	b.used = at + n
	return unsafe.Pointer(&b.mem[at]), nil
}

// boxed returns a zero slice of n elements in the box. They must hold no
// pointer to the heap, which the garbage collector would not see.
func boxed[T any](b *box, n int) ([]T, error) {
	if n == 0 {
		return nil, nil
	}
	var zero T
	p, err := b.take(uintptr(n) * unsafe.Sizeof(zero))
	if err != nil {
		return nil, err
	}
	return unsafe.Slice((*T)(p), n), nil
}

// boxedCopy copies a slice into the box.
func boxedCopy[T any](b *box, s []T) ([]T, error) {
	c, err := boxed[T](b, len(s))
	copy(c, s)
	return c, err
}

// boxedString copies a string, with a zero byte behind it.
func boxedString(b *box, s string) (*byte, error) {
	for i := range len(s) {
		if s[i] == 0 {
			return nil, unix.EINVAL
		}
	}
	c, err := boxed[byte](b, len(s)+1)
	if err != nil {
		return nil, err
	}
	copy(c, s)
	return &c[0], nil
}

// heapArena is how much of the address space Go's heap takes at once, on 64-bit
// Linux.
const heapArena = 64 << 20

// excludeHeap keeps the part of the heap that there is now out of forks. Parts
// that come later are found by a later call; one that was missed costs time and
// nothing else.
func excludeHeap() {
	here := new(uintptr)
	*here = uintptr(unsafe.Pointer(here)) &^ (heapArena - 1)
	// ENOMEM: some of it is not mapped; the rest is done all the same.
	_, _, _ = unix.Syscall(unix.SYS_MADVISE, *here, heapArena, unix.MADV_DONTFORK)
}
