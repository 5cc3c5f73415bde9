package state

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Schema is the version of Record that this package reads and writes. It grows
// by one with every change that an older reader would misread.
const Schema = 1

// Limit bounds the encoded record, in bytes. Annotations and hooks come from
// config.json and are the only parts that can be long.
const Limit = 16 << 20

// ErrSchema is wrapped by the error for a record of another schema.
var ErrSchema = errors.New("state has a schema that this runv does not know")

// Status of a container, as the OCI runtime specification names it, plus
// paused.
type Status string

// The values of Status.
const (
	Creating Status = "creating"
	Created  Status = "created"
	Running  Status = "running"
	Paused   Status = "paused"
	Stopped  Status = "stopped"
)

// Valid reports whether s is one of the values above.
func (s Status) Valid() bool {
	switch s {
	case Creating, Created, Running, Paused, Stopped:
		return true
	}
	return false
}

// Record is what the disk knows of a container, so that list, state and delete
// work when its supervisor is gone. The supervisor writes it; the command line
// only reads.
type Record struct {
	Schema int    `json:"schema"`
	ID     string `json:"id"`
	// SandboxID is the container that the pod's VM lives and ends with; equal
	// to ID for that one itself.
	SandboxID string `json:"sandboxId"`
	// BootID is BootID when the record was written; records did not always have it.
	BootID string `json:"bootId,omitempty"`
	// Bundle and Rootfs are absolute paths.
	Bundle     string `json:"bundle"`
	Rootfs     string `json:"rootfs"`
	OCIVersion string `json:"ociVersion"`
	// Status is the last one that the supervisor wrote; Current tells the truth.
	Status  Status    `json:"status"`
	Created time.Time `json:"created"`
	// StandIn is the host process that stands for the container's init.
	StandIn    ProcessRef `json:"standIn"`
	Supervisor ProcessRef `json:"supervisor"`
	// Hosted: the supervisor is part of a process that does not end with the pod.
	Hosted bool `json:"hosted,omitempty"`
	// VM is the hypervisor's process, which dies with the supervisor but a moment
	// later; no process before there is one.
	VM ProcessRef `json:"vm,omitzero"`
	// VCPUs and MemoryMiB are the size of the pod's VM, in the record of its
	// sandbox container.
	VCPUs       uint32            `json:"vcpus,omitempty"`
	MemoryMiB   uint32            `json:"memoryMiB,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	// NetworkNamespace is the path of the network namespace in which runv has put
	// something beside the interfaces, empty if it ends with the container.
	NetworkNamespace string `json:"networkNamespace,omitempty"`
	// Cgroups are the directories on the host that were made for the container.
	Cgroups []string `json:"cgroups,omitempty"`
	// Resources are the container's limits as they are now, without its rules
	// for devices.
	Resources *specs.LinuxResources `json:"resources,omitempty"`
	// PoststopHooks are run by whoever deletes the container.
	PoststopHooks []specs.Hook `json:"poststopHooks,omitempty"`
	Terminal      bool         `json:"terminal,omitempty"`
	// How the init process ended, once Status is Stopped. ExitSignal is 0 for a
	// process that exited by itself; ExitCode is then its code. With a signal,
	// ExitCode is 128 plus the signal, as shells count.
	ExitCode   int  `json:"exitCode,omitempty"`
	ExitSignal int  `json:"exitSignal,omitempty"`
	OOMKilled  bool `json:"oomKilled,omitempty"`
	// Reason is one line that says why the container ended if it was not its own
	// doing, for example that the VM died.
	Reason string `json:"reason,omitempty"`
	// Owner is the numeric user id of whoever created the container.
	Owner int `json:"owner"`
}

// Current is the status that is true now: a container that was left alive by
// the record but whose stand-in or supervisor has ended is stopped.
func (r *Record) Current() Status {
	if r.Status == Stopped || !r.StandIn.Alive() || !r.Supervisor.Alive() {
		return Stopped
	}
	return r.Status
}

// forget is for a record of another boot: what it names of the kernel went with
// that, and what has such a name today is somebody else's.
func (r *Record) forget() {
	r.StandIn, r.Supervisor, r.VM = ProcessRef{}, ProcessRef{}, ProcessRef{}
	r.NetworkNamespace, r.Cgroups = "", nil
}

// Encode returns the record as JSON with its schema number and the boot id.
func (r *Record) Encode() ([]byte, error) {
	c := *r
	c.Schema, c.BootID = Schema, BootID()
	if err := c.validate(); err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(&c, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode state of container %q: %w", r.ID, err)
	}
	if len(b) > Limit {
		return nil, fmt.Errorf("encode state of container %q: %d bytes, limit %d", r.ID, len(b), Limit)
	}
	return append(b, '\n'), nil
}

// Decode parses what Encode wrote. A record of another schema gives ErrSchema;
// one that is damaged gives an error that says where. One of another boot has no
// processes, no network namespace and no cgroups.
func Decode(b []byte) (*Record, error) {
	var v struct {
		Schema *int `json:"schema"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return nil, fmt.Errorf("decode state: %w", err)
	}
	if v.Schema == nil {
		return nil, errors.New("decode state: it has no schema number")
	}
	if *v.Schema != Schema {
		return nil, fmt.Errorf("%w: %d, want %d; use the runv that created the container", ErrSchema, *v.Schema, Schema)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	r := new(Record)
	if err := dec.Decode(r); err != nil {
		return nil, fmt.Errorf("decode state: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("decode state: something follows the record")
	}
	if err := r.validate(); err != nil {
		return nil, fmt.Errorf("decode state: %w", err)
	}
	if OtherBoot(r.BootID) {
		r.forget()
	}
	return r, nil
}

func (r *Record) validate() error {
	if err := ValidateID(r.ID); err != nil {
		return err
	}
	if err := ValidateID(r.SandboxID); err != nil {
		return fmt.Errorf("sandboxId of container %q: %w", r.ID, err)
	}
	if !r.Status.Valid() {
		return fmt.Errorf("container %q has the unknown status %q", r.ID, r.Status)
	}
	return nil
}
