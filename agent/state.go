package agent

import "fmt"

// containerState is how far a container has come.
//
//	state     event → next
//	creating  created → created, create failed → gone
//	created   start → starting, exited → stopped, delete → deleting
//	starting  started → running, exited → stopped, delete → deleting
//	running   exited → stopped, delete → deleting
//	stopped   started → stopped, delete → deleting
//	deleting  started → deleting, exited → deleting, delete failed → stopped, deleted → gone
//	gone      nothing
//
// The end of the init process makes a container stopped, at whatever point; it
// can be seen before the start that it followed. A start that fails ends the
// init process, so it needs no event of its own.
type containerState int

const (
	stateCreating containerState = iota
	stateCreated
	stateStarting
	stateRunning
	stateStopped
	stateDeleting
	stateGone
)

type containerEvent int

const (
	eventCreated containerEvent = iota
	eventCreateFailed
	eventStart
	eventStarted
	eventExited
	eventDelete
	eventDeleteFailed
	eventDeleted
)

var (
	stateNames = [...]string{"creating", "created", "starting", "running", "stopped", "deleting", "gone"}
	eventNames = [...]string{"created", "create failed", "start", "started", "exited", "delete", "delete failed", "deleted"}
)

func (s containerState) String() string { return stateNames[s] }
func (e containerEvent) String() string { return eventNames[e] }

var transitions = [...]map[containerEvent]containerState{
	stateCreating: {eventCreated: stateCreated, eventCreateFailed: stateGone},
	stateCreated:  {eventStart: stateStarting, eventExited: stateStopped, eventDelete: stateDeleting},
	stateStarting: {eventStarted: stateRunning, eventExited: stateStopped, eventDelete: stateDeleting},
	stateRunning:  {eventExited: stateStopped, eventDelete: stateDeleting},
	stateStopped:  {eventStarted: stateStopped, eventDelete: stateDeleting},
	stateDeleting: {eventStarted: stateDeleting, eventExited: stateDeleting, eventDeleteFailed: stateStopped, eventDeleted: stateGone},
	stateGone:     {},
}

// next returns the state after an event, or an error that names both.
func (s containerState) next(e containerEvent) (containerState, error) {
	n, ok := transitions[s][e]
	if !ok {
		return s, fmt.Errorf("container is %s, which does not go with %s", s, e)
	}
	return n, nil
}
