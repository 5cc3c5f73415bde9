package ocispec

import (
	"encoding/json"
	"fmt"
	"strconv"
)

// The annotations by which engines tell a runtime about pods. containerd's and
// CRI-O's are parts of their CRI implementations; Podman's containers of a pod
// carry CRI-O's, its infra container carries none.
const (
	criType    = "io.kubernetes.cri.container-type"
	criSandbox = "io.kubernetes.cri.sandbox-id"
	criQuota   = "io.kubernetes.cri.sandbox-cpu-quota"
	criPeriod  = "io.kubernetes.cri.sandbox-cpu-period"
	criMemory  = "io.kubernetes.cri.sandbox-memory"

	crioType    = "io.kubernetes.cri-o.ContainerType"
	crioSandbox = "io.kubernetes.cri-o.SandboxID"
)

// crioSizes hold a JSON object each; the second name is CRI-O's newer one. What
// a pod has is the sum of the two lines.
var crioSizes = [][2]string{
	{"io.kubernetes.cri-o.PodLinuxResources", "pod-linux-resources.crio.io"},
	{"io.kubernetes.cri-o.PodLinuxOverhead", "pod-linux-overhead.crio.io"},
}

// Pod is what a container's annotations say of its pod.
type Pod struct {
	// Sandbox: the container is one that a pod begins and ends with.
	Sandbox bool
	// ID of the sandbox container that this one joins; empty: none.
	ID string
	// Field is the annotation that says so, for error messages.
	Field string
}

// PodOf reads the annotations of CRI implementations. The zero Pod is that of a
// container which belongs to none, as far as annotations tell.
func PodOf(annotations map[string]string) (Pod, error) {
	for _, a := range [...]struct{ typ, id string }{{criType, criSandbox}, {crioType, crioSandbox}} {
		typ, ok := annotations[a.typ]
		if !ok {
			continue
		}
		switch typ {
		case "sandbox":
			return Pod{Sandbox: true, Field: annotation(a.typ)}, nil
		case "container":
			id := annotations[a.id]
			if id == "" {
				return Pod{}, fmt.Errorf("%s: is missing, want the id of the sandbox, since %s is %q", annotation(a.id), annotation(a.typ), typ)
			}
			return Pod{ID: id, Field: annotation(a.id)}, nil
		default:
			return Pod{}, fmt.Errorf("%s: is %q, want \"sandbox\" or \"container\"", annotation(a.typ), clip(typ))
		}
	}
	return Pod{}, nil
}

func annotation(key string) string { return fmt.Sprintf("annotations[%q]", key) }

// podSize is what all containers of a pod will ask for together, as far as its
// sandbox is told. Zero and negative values are no limit.
type podSize struct {
	quota  int64  // µs of processor time in a period
	period uint64 // µs; 0: the default
	memory int64  // bytes
}

// parsePodSize reads what a kubelet has computed and a CRI implementation hands
// down with the sandbox.
func parsePodSize(annotations map[string]string) (podSize, error) {
	var s podSize
	for _, f := range [...]struct {
		key string
		set func(n int64)
	}{
		{criQuota, func(n int64) { s.quota = n }},
		{criPeriod, func(n int64) { s.period = uint64(max(n, 0)) }},
		{criMemory, func(n int64) { s.memory = n }},
	} {
		v, ok := annotations[f.key]
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return s, fmt.Errorf("%s: is %q, want a whole number", annotation(f.key), clip(v))
		}
		f.set(n)
	}
	for _, keys := range crioSizes {
		key := keys[1]
		v, ok := annotations[key]
		if !ok {
			key = keys[0]
			v, ok = annotations[key]
		}
		if !ok || v == "" {
			continue
		}
		var r struct {
			Period int64 `json:"cpu_period"`
			Quota  int64 `json:"cpu_quota"`
			Memory int64 `json:"memory_limit_in_bytes"`
		}
		if err := json.Unmarshal([]byte(v), &r); err != nil {
			return s, fmt.Errorf("%s: is %q, want an object with cpu_period, cpu_quota and memory_limit_in_bytes", annotation(key), clip(v))
		}
		if r.Period > 0 {
			s.period = uint64(r.Period)
		}
		s.quota = sum(s.quota, r.Quota)
		s.memory = sum(s.memory, r.Memory)
	}
	return s, nil
}

// sum adds what is a limit, up to the largest number that there is.
func sum(a, b int64) int64 {
	a, b = max(a, 0), max(b, 0)
	if a > 1<<62 || b > 1<<62 {
		return 1<<63 - 1
	}
	return a + b
}
