package seccomp

import (
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Compile translates s for a kernel of the given Go architecture.
func Compile(s *specs.LinuxSeccomp, arch string) (filter []byte, flags uint32, err error) {
	return nil, 0, nil
}
