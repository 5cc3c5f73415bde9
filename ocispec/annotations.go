package ocispec

import (
	"fmt"
	"slices"
	"sort"
	"strconv"
	"strings"
)

// AnnotationPrefix begins the annotations that are runv's own. They form a
// closed set: none of them is a path or an argument of a program, because who
// may set a container's annotations may not choose what runs on the host.
const AnnotationPrefix = "io.runv."

// The annotations of runv. They size the VM of a pod, and so are read from its
// first container.
const (
	// AnnotationVCPUs is the number of virtual processors, 1 to 1024.
	AnnotationVCPUs = AnnotationPrefix + "vcpus"
	// AnnotationMemory is the VM's memory in MiB, or with one of the suffixes
	// MiB and GiB; at least 64 MiB.
	AnnotationMemory = AnnotationPrefix + "memory"
	// AnnotationNetwork is NetworkNamespace, NetworkNone or NetworkUser.
	AnnotationNetwork = AnnotationPrefix + "network"
)

// The annotations of runv that are about the container that has them.
const (
	// AnnotationRootfsType says that root.path is an image file or a block device
	// with a file system of this type: ext4, erofs or squashfs.
	AnnotationRootfsType = AnnotationPrefix + "rootfs-type"
	// AnnotationOverlay, "guest", lets what the container writes to its root file
	// system go to memory of the guest.
	AnnotationOverlay = AnnotationPrefix + "overlay"
)

// minMemoryMiB is the least that a driver accepts, hypervisor.Config.MemoryMiB.
const minMemoryMiB = 64

// The largest VM that limits and annotations can ask for, if Options say nothing.
const (
	maxVCPUs     = 1024
	maxMemoryMiB = 1 << 20
)

// vmRequest is what annotations ask of the VM; zero values ask nothing.
type vmRequest struct {
	vcpus, memoryMiB uint32
	network          string
}

// parseAnnotations reads runv's own and refuses those that it does not know, so
// that a misspelt one does not pass for one that is obeyed.
func parseAnnotations(annotations map[string]string) (vmRequest, error) {
	var req vmRequest
	keys := make([]string, 0, 5)
	for key := range annotations {
		if strings.HasPrefix(key, AnnotationPrefix) {
			keys = append(keys, key)
		}
	}
	sort.Strings(keys) // the same error every time
	for _, key := range keys {
		v := annotations[key]
		switch key {
		case AnnotationVCPUs:
			n, err := strconv.ParseUint(v, 10, 32)
			if err != nil || n < 1 || n > maxVCPUs {
				return req, fmt.Errorf("annotations[%q]: is %q, want a number of processors, 1 to %d", key, clip(v), maxVCPUs)
			}
			req.vcpus = uint32(n)
		case AnnotationMemory:
			n, ok := parseMiB(v)
			if !ok || n < minMemoryMiB || n > maxMemoryMiB {
				return req, fmt.Errorf("annotations[%q]: is %q, want MiB, or a number with MiB or GiB, of at least %d MiB", key, clip(v), minMemoryMiB)
			}
			req.memoryMiB = uint32(n)
		case AnnotationNetwork:
			if v != NetworkNamespace && v != NetworkNone && v != NetworkUser {
				return req, fmt.Errorf("annotations[%q]: is %q, want %q, %q or %q", key, clip(v), NetworkNamespace, NetworkNone, NetworkUser)
			}
			req.network = v
		case AnnotationRootfsType, AnnotationOverlay: // parseStorage
		default:
			return req, fmt.Errorf("annotations[%q]: is not one of runv's, want %s, %s, %s, %s or %s", clip(key),
				AnnotationVCPUs, AnnotationMemory, AnnotationNetwork, AnnotationRootfsType, AnnotationOverlay)
		}
	}
	return req, nil
}

// storageRequest is what annotations ask of a container's root file system.
type storageRequest struct {
	rootfsType string
	overlay    bool
}

func parseStorage(annotations map[string]string) (storageRequest, error) {
	var req storageRequest
	if v, ok := annotations[AnnotationRootfsType]; ok {
		if !slices.Contains(diskFileSystems, v) {
			return req, fmt.Errorf("annotations[%q]: is %q, want the file system of an image at root.path, one of %s", AnnotationRootfsType, clip(v), strings.Join(diskFileSystems, ", "))
		}
		req.rootfsType = v
	}
	if v, ok := annotations[AnnotationOverlay]; ok {
		if v != "guest" {
			return req, fmt.Errorf("annotations[%q]: is %q, want \"guest\"", AnnotationOverlay, clip(v))
		}
		req.overlay = true
	}
	return req, nil
}

func parseMiB(s string) (uint64, bool) {
	unit := uint64(1)
	if t, ok := strings.CutSuffix(s, "GiB"); ok {
		s, unit = t, 1024
	} else if t, ok := strings.CutSuffix(s, "MiB"); ok {
		s = t
	}
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return 0, false
	}
	return n * unit, true
}
